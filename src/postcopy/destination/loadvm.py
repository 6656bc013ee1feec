"""Loads the records of an incoming stream, as QEMU's ``loadvm`` does: what each does, and when it may come.

One thread, ``destination``, calls this with the records in their order.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from postcopy.channel.channel import Channel
from postcopy.channel.files import FileChannel
from postcopy.destination.incoming_ram import discard, read_pages
from postcopy.destination.multifd import IncomingMultifd
from postcopy.destination.postcopy import Postcopy
from postcopy.destination.preempt_channel import PreemptChannel
from postcopy.destination.return_path import ReturnPath
from postcopy.errors import StreamError
from postcopy.guest import DeviceState, Guest
from postcopy.memory.page_map import RECEIVED
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Mask
from postcopy.multifd.threads import FileAccess
from postcopy.paging.placement import Placement
from postcopy.paging.ram import IncomingRam
from postcopy.parameters import Capabilities, Capability
from postcopy.statistics import WaitCause
from postcopy.status import Status, StatusMachine
from postcopy.stream import records
from postcopy.stream.decoder import Decoder
from postcopy.stream.encoded_records import apply_delta
from postcopy.stream.layout import BlockLayout, DeviceFormats, Layout
from postcopy.stream.numbers import FIRMWARE_PAGE_BYTES, SectionType
from postcopy.stream.pings import ALL_SENT_PING
from postcopy.trace import trace

RECEIVE_BUFFER_BYTES = 4096 << 10
"""How much the kernel may queue of the main channel once pages are requested."""


def layout_of(ram: IncomingRam) -> Layout:
    """The blocks of this side, as a decoder needs to know them."""
    return {
        paged.block.name: BlockLayout(paged.block.size_bytes, paged.block.page_size_bytes)
        for paged in ram
    }


class RecordLoader:
    """The state of one incoming stream, over all its connections.

    :param capabilities: read when they matter; a user may set them until the source has connected.
    """

    def __init__(
        self,
        guest: Guest,
        formats: DeviceFormats,
        ram: IncomingRam,
        placement: Placement,
        postcopy: Postcopy,
        preempt_channel: PreemptChannel,
        multifd: IncomingMultifd,
        return_path: ReturnPath,
        progress: StatusMachine,
        capabilities: Callable[[], Capabilities],
    ) -> None:
        self._guest = guest
        self._formats = formats
        self._ram = ram
        self._placement = placement
        self._postcopy = postcopy
        self._preempt_channel = preempt_channel
        self._multifd = multifd
        self._return_path = return_path
        self._progress = progress
        self._capabilities = capabilities
        self.channel: Channel | None = None
        self.advised = False
        self.ram_seen = False
        self.ram_ended = False
        """Whether RAM's last section has come: a background snapshot has none."""
        self._their_sizes: dict[str, int] = {}
        self._devices: list[DeviceState] = []
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            records.RamSetup: self._ram_setup,
            records.MappedBlock: self._mapped_block,
            records.Pages: self._pages,
            records.XbzrlePage: self._delta,
            records.MultifdFlush: lambda _: multifd.flush(),
            records.RamRecordsEnd: lambda _: multifd.section_ended(),
            records.RamBodyEnd: self._ram_body_end,
            records.ZeroPages: lambda r: placement.zeros(r.block, r.offsets),
            records.DeviceSection: self._device,
            records.OpenReturnPath: self._open_return_path,
            records.Ping: self._ping,
            records.PostcopyAdvise: self._advise,
            records.RamDiscard: self._discard,
            records.Package: self._package,
            records.RecvBitmap: self._recv_bitmap,
            records.PostcopyResume: self._resume,
        }

    def load(self, record: records.Record) -> None:
        """Do what a record says; a record without a meaning for this side is skipped.

        :raises StreamError: it must not come now, or does not fit this side.
        """
        handler = self._handlers.get(type(record))
        if handler is not None:
            handler(record)

    def load_devices(self) -> None:
        """Load the device states received so far: in precopy, all memory has come before them."""
        devices, self._devices = self._devices, []
        if devices:
            self.give_postcopy_up()  # loading may touch memory, and no pager runs yet
            self._guest.load_devices(devices)

    def give_postcopy_up(self) -> None:
        """The migration ends without postcopy: unregister the memory from the userfaultfd."""
        if self.advised:
            self.advised = False
            self._guest.unwatch_missing()

    # --- precopy

    def _ram_setup(self, setup: records.RamSetup) -> None:
        self.ram_seen = True
        self._their_sizes = theirs = {entry.name: entry.size_bytes for entry in setup.blocks}
        ours = layout_of(self._ram)
        ignored = {name: size for name, size in theirs.items() if name not in ours}
        if ignored:
            self._guest.keep_stream(setup.section_id, ignored)
        for paged in self._ram:
            if paged.block.name not in theirs:
                # QEMU does not notice: its guest would run with what happened to be in memory.
                raise StreamError(f"the source has no RAM block '{paged.block.name}'")
        if list(ours) != (order := [name for name in theirs if name in ours]):
            # QEMU does not notice: its guest would find its memory at other addresses.
            raise StreamError(
                f"the source has its RAM blocks in the order {', '.join(order)}, and this side "
                f"{', '.join(ours)}; give --memory-block in the source's order"
            )
        self._multifd.begin(setup, ignored)

    def _mapped_block(self, block: records.MappedBlock) -> None:
        channel = self.channel
        assert isinstance(channel, FileChannel)
        if block.name in layout_of(self._ram):
            access = FileAccess.wanted(self._capabilities(), self._multifd.parameters())
            read_pages(channel, self._ram[block.name], block, access)
        channel.seek(block.end_offset)

    def _ram_body_end(self, end: records.RamBodyEnd) -> None:
        self.ram_ended = end.kind is SectionType.END

    def _pages(self, pages: records.Pages) -> None:
        self._placement.pages(pages.block, pages.offsets, pages.data, neighbours=pages.neighbours)

    def _delta(self, record: records.XbzrlePage) -> None:
        if self._postcopy.listening:
            raise StreamError("an XBZRLE page while the guest runs here", record.position)
        paged = self._ram[record.block]
        page = record.offset // TARGET_PAGE_BYTES
        if paged.pages.states[page // paged.block.target_pages_per_page] != RECEIVED:
            raise StreamError(
                f"an XBZRLE page at {record.offset:#x} of block '{record.block}' that has not come yet",
                record.position,
            )
        apply_delta(record, paged.block.pages[page])

    def _device(self, section: records.DeviceSection) -> None:
        if self._postcopy.listening:
            raise StreamError(f"section {section.name} behind the package")
        self._devices.append(
            DeviceState(section.name, section.instance, section.version, section.payload)
        )

    def _open_return_path(self, _: records.OpenReturnPath) -> None:
        assert self.channel is not None
        self._return_path.open(self.channel)
        if self._multifd.parameters().acknowledged(self._capabilities()):
            self._return_path.switchover_ack()
        self._multifd.settle()  # now a source can be told why it is refused

    def _ping(self, ping: records.Ping) -> None:
        if not self._return_path.is_open:
            raise StreamError(f"CMD_PING ({ping.value:#x}) received with no return path")
        # A pong says that everything before the ping has been loaded, devices included.
        self.load_devices()
        if ping.value == ALL_SENT_PING:
            self._all_sent()
        self._return_path.pong(ping.value)

    # --- postcopy

    def _advise(self, advise: records.PostcopyAdvise) -> None:
        wanted = self._capabilities().enabled(Capability.POSTCOPY_RAM)
        if self.advised or self.ram_seen:
            raise StreamError("CMD_POSTCOPY_ADVISE in wrong postcopy state (1)")
        if advise.page_sizes is None or advise.target_page_bytes is None:
            if wanted:
                raise StreamError("RAM postcopy is enabled but have 0 byte advise")
            raise StreamError("postcopy of dirty bitmaps is not supported: there are no disks")
        if not wanted:
            raise StreamError("RAM postcopy is disabled but have 16 byte advise")
        ours = firmware = FIRMWARE_PAGE_BYTES.get(self._guest.machine_name, 0)
        for paged in self._ram:
            ours |= paged.block.page_size_bytes
        if advise.page_sizes | firmware != ours:  # an older one of ours did not count it
            raise StreamError(
                f"Postcopy needs matching RAM page sizes (s={advise.page_sizes:x} d={ours:x}); give the "
                "destination's --memory-block the source's page-size"
            )
        if advise.target_page_bytes != TARGET_PAGE_BYTES:
            raise StreamError(
                "Postcopy needs matching target page sizes "
                f"(s={advise.target_page_bytes} d={TARGET_PAGE_BYTES})"
            )
        self.advised = True
        self._postcopy.prepare()
        trace("destination.advised")

    def _discard(self, command: records.RamDiscard) -> None:
        if not self.advised or self._postcopy.listening:
            raise StreamError("CMD_POSTCOPY_RAM_DISCARD in wrong postcopy state (0)")
        self._postcopy.expect_guest()
        discard(self._ram, command.block, command.ranges)

    def _package(self, package: records.Package) -> None:
        if not self.advised:
            raise StreamError("CMD_POSTCOPY_LISTEN in wrong postcopy state (0)")
        trace("destination.package-received")
        self._multifd.end()
        decoder = Decoder(self._formats, layout_of(self._ram), package=True)
        assert self.channel is not None
        self.channel.bound_buffers(RECEIVE_BUFFER_BYTES)
        self._preempt_channel.accept()  # before any page can be requested
        userfaultfd = self._postcopy.take_package(decoder, package.data)
        self._placement.listen(userfaultfd, self._postcopy.mapper.later)
        self._preempt_channel.start(userfaultfd)

    def _all_sent(self) -> None:
        """The source has sent every page: finish, so that a broken connection does no harm any more."""
        if not self._postcopy.listening:
            raise StreamError(
                "a source says that it has sent every page before its guest runs here"
            )
        if self._progress.status is Status.POSTCOPY_RECOVER:
            raise StreamError("a source says that it has sent every page before it asked which")
        self._preempt_channel.finish()
        # All pages were pending at the source: one that is missing now would read as zeros.
        if missing := self._ram.missing_pages:
            raise StreamError(f"the source has sent all, but {missing} pages have not come")
        self._postcopy.finish()
        trace("destination.nothing-missing")

    # --- recovery

    @property
    def page_cause(self) -> WaitCause:
        """What a thread waits for that waits for a page, while the source is connected."""
        preempt = Capability.POSTCOPY_PREEMPT in self._capabilities().on
        return WaitCause.PREEMPT if preempt else WaitCause.PAGE

    def _recv_bitmap(self, command: records.RecvBitmap) -> None:
        self._check_recovering("CMD_RECV_BITMAP")
        trace("destination.bitmap-asked")
        self._return_path.bitmap(command.block, self._received(command.block))
        trace("destination.bitmap-sent")

    def _received(self, name: str) -> Mask:
        """Which target pages of a block are in place; all pages of a block that is ignored here."""
        if name not in layout_of(self._ram):
            ignored = self._their_sizes or self._guest.kept_stream()[1]
            if name in ignored:
                return np.ones(ignored[name] // TARGET_PAGE_BYTES, np.bool_)
            raise StreamError(f"CMD_RECV_BITMAP: there is no RAM block '{name}'")
        paged = self._ram[name]
        return np.repeat(~paged.pages.missing(), paged.block.target_pages_per_page)

    def _resume(self, _: records.PostcopyResume) -> None:
        self._check_recovering("CMD_POSTCOPY_RESUME")
        trace("destination.resume-received")
        self._preempt_channel.accept()
        self._preempt_channel.start(self._postcopy.userfaultfd)
        self._progress.move(Status.POSTCOPY_ACTIVE)
        self._postcopy.waits_for(self.page_cause)
        self._return_path.resume_ack()
        trace("destination.resume-acknowledged")
        self._return_path.release_requests()
        self._postcopy.ask_again()

    def _check_recovering(self, what: str) -> None:
        if self._progress.status is not Status.POSTCOPY_RECOVER:
            raise StreamError(f"{what}: not in a recovery, but {self._progress.status.value}")
