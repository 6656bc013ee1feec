"""The destination of one migration.

The thread ``destination`` reads the main channel and does what comes on it, in order.  Precopy ends
with the end of the stream; postcopy goes on, under the guest that runs, with the threads of
:mod:`postcopy.destination.postcopy`.
"""

from collections.abc import Callable
from typing import Any

from postcopy.channel.channel import Channel
from postcopy.channel.listen import Listener
from postcopy.destination.incoming_ram import Populating, discard
from postcopy.destination.postcopy import Postcopy
from postcopy.destination.return_path import ReturnPath
from postcopy.errors import ChannelBroken, PostcopyError, StreamError
from postcopy.guest import DeviceState
from postcopy.link.guest_proxy import GuestProxy
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.paging.blocktime import Blocktime
from postcopy.paging.placement import Placement
from postcopy.paging.ram import PagedRam
from postcopy.parameters import Capabilities, Capability
from postcopy.statistics import MigrationInfo
from postcopy.status import Progress, Status
from postcopy.stream import records
from postcopy.stream.decoder import Decoder
from postcopy.stream.layout import BlockLayout, DeviceFormats, Expected, Layout

IGNORED_BLOCKS = frozenset({"pc.bios", "pc.rom"})
"""Blocks of a real microvm that a guest without firmware has no use for."""


class Destination:
    """One incoming migration."""

    def __init__(
        self,
        guest: GuestProxy,
        formats: DeviceFormats,
        listener: Listener,
        ram: PagedRam,
        populating: Populating,
        capabilities: Capabilities,
        progress: Progress,
    ) -> None:
        self._guest = guest
        self._formats = formats
        self._listener = listener
        self._ram = ram
        self._populating = populating
        self._capabilities = capabilities
        self._progress = progress
        self.error: PostcopyError | None = None
        self._blocktime = Blocktime({t.thread_id: t.index for t in guest.vcpu_threads()})
        self._placement = Placement(ram, self._blocktime)
        self._return_path = ReturnPath()
        self._postcopy = Postcopy(
            guest, ram, self._blocktime, self._return_path, progress, self._wake
        )
        self._devices: list[DeviceState] = []
        self._advised = False
        self._ram_seen = False
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            records.RamSetup: self._ram_setup,
            records.Pages: lambda r: self._placement.pages(r.block, r.offsets, r.data),
            records.ZeroPages: lambda r: self._placement.zeros(r.block, r.offsets),
            records.DeviceSection: self._device,
            records.OpenReturnPath: lambda _: self._return_path.open(self._connected()),
            records.Ping: self._ping,
            records.PostcopyAdvise: self._advise,
            records.RamDiscard: self._discard,
            records.Package: self._package,
        }
        self._channel: Channel | None = None

    def info(self) -> MigrationInfo:
        """The figures as they are now."""
        return self._postcopy.info(self._progress.status, self._capabilities)

    def cancel(self) -> None:
        """Stop waiting, or break off: the guest's process is leaving."""
        self._listener.close()
        if self._channel is not None:
            self._channel.shutdown()

    def set_capabilities(self, capabilities: Capabilities) -> None:
        """Take over capabilities that were set while nobody had called yet."""
        self._capabilities = capabilities

    def pause(self) -> None:
        """Break the postcopy on purpose."""
        if self._channel is not None:
            self._channel.shutdown()

    # --- the thread of the destination

    def run(self) -> None:
        """Take one guest in."""
        try:
            self._channel = channel = self._listener.accept()
            self._populating.stop()
            self._progress.move(Status.ACTIVE)
            self._receive(channel)
        except PostcopyError as error:
            self._fail(self._postcopy.failure or error)
        finally:
            self._let_go()

    def _wake(self) -> None:
        """The package has failed: nothing that still comes can help."""
        self._connected().shutdown()

    def _receive(self, channel: Channel) -> None:
        decoder = self._decoder()
        while not isinstance(record := decoder.next_record(), records.EndOfStream):
            if record is not None:
                handler = self._handlers.get(type(record))
                if handler is not None:
                    handler(record)
            elif count := channel.receive_into(decoder.buffer()):
                decoder.received(count)
            else:
                decoder.finish()
        if self._postcopy.listening:
            self._postcopy.finish()
            self._return_path.shut(failed=False)
            self._end(Status.COMPLETED)
        else:
            self._complete_precopy()
        self._drain(channel, decoder)

    def _decoder(self) -> Decoder:
        layout: Layout = {
            paged.block.name: BlockLayout(paged.block.size_bytes, paged.block.page_size_bytes)
            for paged in self._ram
        }
        expected = Expected(machine=self._guest.machine_name)
        return Decoder(self._formats, layout, expect=expected, ignored_blocks=IGNORED_BLOCKS)

    def _complete_precopy(self) -> None:
        if not self._ram_seen:
            raise StreamError("the stream ended without any RAM: nothing has arrived")
        if self._advised:
            self._guest.unwatch_missing()  # it was in vain: nothing will mend a fault
        self._load_devices()
        self._guest.resume()
        self._return_path.shut(failed=False)
        self._end(Status.COMPLETED)

    @staticmethod
    def _drain(channel: Channel, decoder: Decoder) -> None:
        """Take what follows the end (a description), so that closing does not cut our answer off."""
        try:
            while count := channel.receive_into(decoder.buffer()):
                decoder.received(count)
                while decoder.next_record() is not None:
                    pass
        except PostcopyError:
            pass  # the guest is here already: nothing in what follows matters

    # --- the elements of the stream

    def _connected(self) -> Channel:
        assert self._channel is not None
        return self._channel

    def _ram_setup(self, setup: records.RamSetup) -> None:
        self._ram_seen = True
        theirs = {entry.name for entry in setup.blocks}
        for paged in self._ram:
            if paged.block.name not in theirs:
                # QEMU does not notice: its guest would run with what the destination happened to have.
                raise StreamError(f"the source has no RAM block '{paged.block.name}'")

    def _device(self, section: records.DeviceSection) -> None:
        self._devices.append(
            DeviceState(section.name, section.instance, section.version, section.payload)
        )

    def _load_devices(self) -> None:
        devices, self._devices = self._devices, []
        if devices:
            self._guest.load_devices(devices)

    def _ping(self, ping: records.Ping) -> None:
        if not self._return_path.is_open:
            raise StreamError(f"CMD_PING ({ping.value:#x}) received with no return path")
        # A pong says that everything before the ping has been taken, devices included.
        self._load_devices()
        self._return_path.pong(ping.value)

    def _advise(self, advise: records.PostcopyAdvise) -> None:
        wanted = self._capabilities.enabled(Capability.POSTCOPY_RAM)
        if self._advised or self._ram_seen:
            raise StreamError("CMD_POSTCOPY_ADVISE in wrong postcopy state (1)")
        if advise.page_sizes is None or advise.target_page_bytes is None:
            if wanted:
                raise StreamError("RAM postcopy is enabled but have 0 byte advise")
            raise StreamError("postcopy of dirty bitmaps is not supported: there are no disks")
        if not wanted:
            raise StreamError("RAM postcopy is disabled but have 16 byte advise")
        ours = 0
        for paged in self._ram:
            ours |= paged.block.page_size_bytes
        if advise.page_sizes != ours:
            raise StreamError(
                f"Postcopy needs matching RAM page sizes (s={advise.page_sizes:x} d={ours:x})"
            )
        if advise.target_page_bytes != TARGET_PAGE_BYTES:
            raise StreamError(
                "Postcopy needs matching target page sizes "
                f"(s={advise.target_page_bytes} d={TARGET_PAGE_BYTES})"
            )
        self._advised = True
        self._postcopy.prepare()

    def _discard(self, command: records.RamDiscard) -> None:
        if not self._advised or self._postcopy.listening:
            raise StreamError("CMD_POSTCOPY_RAM_DISCARD in wrong postcopy state (0)")
        discard(self._ram, command.block, command.ranges)

    def _package(self, package: records.Package) -> None:
        if not self._advised:
            raise StreamError("CMD_POSTCOPY_LISTEN in wrong postcopy state (0)")
        layout: Layout = {
            paged.block.name: BlockLayout(paged.block.size_bytes, paged.block.page_size_bytes)
            for paged in self._ram
        }
        decoder = Decoder(self._formats, layout, package=True)
        self._connected().bound_buffers(POSTCOPY_BUFFER_BYTES)
        self._placement.listen(self._postcopy.take_package(decoder, package.data))

    # --- the end

    def _fail(self, error: PostcopyError) -> None:
        self.error = error
        lost_link = isinstance(error, ChannelBroken | StreamError)
        if self._progress.status is Status.POSTCOPY_ACTIVE and lost_link:
            self._return_path.close()
            self._progress.move(Status.POSTCOPY_PAUSED)
            return
        try:
            self._return_path.shut(failed=True)
        except ChannelBroken:
            pass  # nobody is there to hear it
        if self._progress.status not in {Status.COMPLETED, Status.FAILED}:
            self._end(Status.FAILED)

    def _end(self, status: Status) -> None:
        """Say that it is over.  Whoever hears it may end this process: nothing outside may be left."""
        self._listener.close()
        self._progress.move(status)

    def _let_go(self) -> None:
        self._populating.stop()
        self._listener.close()
        if self._channel is not None:
            self._channel.close()
        if self._progress.status is Status.POSTCOPY_PAUSED:
            return  # the pager goes on, and recovery will bring another channel
        self._postcopy.close()
        self._ram.close()


POSTCOPY_BUFFER_BYTES = 1 << 20
"""What the kernel may hold of the main channel once urgent pages travel on it."""
