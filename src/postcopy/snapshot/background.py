"""A picture of a guest that goes on: QEMU's background snapshot.

Threads: ``source`` runs :meth:`BackgroundSnapshot.run` and writes; ``snapshot-faults`` keeps what the
guest overwrites meanwhile (:mod:`postcopy.snapshot.write_protect`).  The guest stands still only while its
devices are saved.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

from postcopy.channel.address import parse
from postcopy.channel.channel import Channel
from postcopy.channel.connect import connect
from postcopy.channel.partial_file import PartialFile
from postcopy.channel.rate_limit import RateLimiter
from postcopy.errors import HostCannot, MigrationCancelled, PostcopyError
from postcopy.guest import DeviceState, Guest
from postcopy.image.last_moment import LastMoment
from postcopy.kernel.cpu_latency import CpusAwake
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.memory.ram_block import RamBlock
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.snapshot.bitmap import Copies, UnsavedPages
from postcopy.snapshot.cow_buffer import Aside
from postcopy.snapshot.write_protect import WriteProtectHandler
from postcopy.source.connection import connect_unless_cancelled
from postcopy.source.counters import Clock, Counters, Rate, describe
from postcopy.source.page_sink import PageSink, page_sink_for
from postcopy.source.stream_header import stream_header
from postcopy.source.switchover import device_sections
from postcopy.source.user_requests import UserRequests
from postcopy.statistics import Measured, MigrationInfo
from postcopy.status import Progress, Status
from postcopy.stream import encoder
from postcopy.trace import trace

UNLIMITED = 0
"""As QEMU does it: ``max-bandwidth`` is for migrations."""


class BackgroundSnapshot:
    """One background snapshot; the guest stays here, whatever happens."""

    def __init__(
        self,
        guest: Guest,
        uri: str,
        capabilities: Capabilities,
        parameters: Parameters,
        progress: Progress,
        describe_devices: Callable[[Sequence[DeviceState]], str],
    ) -> None:
        self._guest = guest
        self._address = parse(uri)
        self._file = PartialFile(self._address)
        self._last_moment = LastMoment()
        self._capabilities = capabilities
        self._parameters = parameters
        self._progress = progress
        self._describe_devices = describe_devices
        self.requests = UserRequests()
        self.error: PostcopyError | None = None
        self._counters = Counters()
        self._clock = Clock()
        self._aside = Aside()
        self._device_bytes = 0
        # Made by the steps of it, in this order.
        self._channel: Channel | None = None
        self._sender: PageSink | None = None
        self._blocks: list[RamBlock] = []
        self._unsaved: UnsavedPages | None = None
        self._guard: WriteProtectHandler | None = None
        self._cause: PostcopyError | None = None

    # --- called by the monitor, from other threads

    def cancel(self) -> None:
        """Give up; without effect once the file gets its name, or the end has come."""
        if self._last_moment.give_up(self._begin_cancel):
            self._break_off()

    def _begin_cancel(self) -> None:
        before = frozenset({Status.SETUP, Status.ACTIVE})
        if self._progress.move(Status.CANCELLING, only_from=before):
            self.requests.cancel()

    def pause(self) -> None:
        """Nothing: only a postcopy can be paused."""

    def set_parameters(self, parameters: Parameters) -> None:
        """Nothing: those that mean something here count from the beginning."""

    def leave(self) -> None:
        """The engine ends, and with it a command that writes the image: no half of one stays."""
        channel = self._channel  # its own thread may let go of it meanwhile
        if channel is not None:
            channel.leave()
        self._file.end()

    def info(self) -> MigrationInfo:
        """The figures as they are now."""
        remaining = self._unsaved.remaining_bytes if self._unsaved is not None else 0
        rate = self._sender.rate if self._sender is not None else Rate()
        info = describe(self._counters, rate, self._clock, self._progress.status, remaining)
        return replace(info, measured=self._measured())

    # --- the thread of the snapshot

    def run(self) -> None:
        """Take the picture; whatever happens, the guest runs on, and nothing holds up its writes."""
        try:
            channel, sender = self._open()
            states = self._save(sender)
            self._finish(channel, sender, states)
            self._publish()
            self._clock.ended = time.monotonic()
            self._progress.move(Status.COMPLETED)
        except PostcopyError as error:
            self._fail(error)
        finally:
            self._let_go()

    def _open(self) -> tuple[Channel, PageSink]:
        """Reach the sink, and say what is to come."""
        address = self._file.begin()
        self._channel = channel = (
            connect(address)  # on return it is there
            if self._file.ordinary
            else connect_unless_cancelled(address, self.requests)
        )
        channel.description = str(self._address)  # what was asked for, in each error
        # A host that is gone must not make the guest wait for what it will never take.
        channel.watch(self._parameters.x_link_timeout / 1000)
        trace("snapshot.connected")
        self._sender = sender = page_sink_for(
            channel, self._capabilities, RateLimiter(UNLIMITED), self._counters
        )
        self._blocks = blocks = [RamBlock(region) for region in self._guest.regions()]
        self._unsaved = UnsavedPages(blocks)
        self._counters.total_bytes = self._unsaved.remaining_bytes
        self._check_cancelled()
        channel.send(
            stream_header(self._guest.machine_name, blocks, self._capabilities, answered=False)
        )
        sender.begin(blocks, postcopy=False)
        self._clock.set_up = time.monotonic()
        self._progress.move(Status.ACTIVE)
        trace("snapshot.active")
        return channel, sender

    def _save(self, sender: PageSink) -> Sequence[DeviceState]:
        """Write all pages as they are at one moment; return what the devices were then."""
        try:
            (space,) = self._guest.watch_snapshot()
        except PostcopyError as error:
            self._guest.unwatch_snapshot()
            if isinstance(error, HostCannot):
                return self._save_still(sender, error)
            raise
        with self._watched(Userfaultfd.from_fd(space.userfaultfd)) as guard:
            guard.arm()
            trace("snapshot.armed")
            states = self._freeze(guard)
            self._write_pages(sender, guard.let_go)
        return states

    def _save_still(self, sender: PageSink, lacking: HostCannot) -> Sequence[DeviceState]:
        """Write all pages of a guest that its user has stopped, and that does not run meanwhile.

        :param lacking: why the writes of a guest that runs cannot be watched: raised if this one does.
        """
        self._check_cancelled()
        self._clock.stopped = time.monotonic()
        try:
            states = self._guest.pause_and_save()
            if any(state.name == "globalstate" and b"running" in state.payload for state in states):
                raise lacking
            trace("snapshot.guest-stopped")
            self._write_pages(sender, lambda _block, _first, _end: None)
        finally:
            self._guest.resume()
        self._clock.handed_over = time.monotonic()
        trace("snapshot.guest-resumed")
        return states

    @contextmanager
    def _watched(self, userfaultfd: Userfaultfd) -> Iterator[WriteProtectHandler]:
        """Have the guest's memory watched for writes; in every case it is not any more afterwards."""
        assert self._unsaved is not None
        try:
            self._guard = guard = WriteProtectHandler(
                userfaultfd, self._unsaved, self._aside, self._stop_because
            )
            guard.start()
            try:
                yield guard
            finally:
                guard.stop()
        finally:
            self._guest.unwatch_snapshot()  # who still waits to write goes on
        trace("snapshot.unwatched")

    def _freeze(self, guard: WriteProtectHandler) -> Sequence[DeviceState]:
        """The moment of the picture; return what the devices were then."""
        self._check_cancelled()
        with closing(CpusAwake()) as awake:
            awake.a_while()
            self._clock.stopped = time.monotonic()
            try:
                # The devices before the memory is frozen: one may write to it while it is being saved.
                states = self._guest.pause_and_save()
                trace("snapshot.guest-stopped")
                guard.freeze()
                trace("snapshot.frozen")
            finally:
                self._guest.resume()
            self._clock.handed_over = time.monotonic()
        trace("snapshot.guest-resumed")
        return states

    def _write_pages(self, sender: PageSink, let_go: Callable[[RamBlock, int, int], None]) -> None:
        """Write all pages: first those that the guest has overwritten, for they take memory.

        :param let_go: told which have been copied, and may be written to.
        """
        assert self._unsaved is not None
        for copies in self._unsaved.sweep():
            let_go(copies.block, copies.first, copies.end)
            self._write(sender, copies)
            self._write_aside(sender, self._aside.take)
            trace("snapshot.writing")
        trace("snapshot.all-saved")
        self._write_aside(sender, self._aside.take_rest)
        self._check_complete()

    def _write_aside(self, sender: PageSink, take: Callable[[], Copies | None]) -> None:
        while (copies := take()) is not None:
            self._write(sender, copies)
            self._aside.written(copies)

    def _write(self, sender: PageSink, copies: Copies) -> None:
        self._check_cancelled()
        if len(copies.data):
            sender.send_copies(copies.block.name, copies.data, copies.contents)
        if len(copies.zeros):
            sender.send_zeros(copies.block.name, copies.zeros)
        sender.count()

    def _finish(self, channel: Channel, sender: PageSink, states: Sequence[DeviceState]) -> None:
        """Write the devices and the end, and see that all of it has arrived."""
        # As QEMU has it: a stream of a background snapshot has no last section of RAM.
        mapped = self._capabilities.enabled(Capability.MAPPED_RAM)
        end_of_ram = sender.end_of_ram() if mapped else b""
        sections = device_sections(states)
        description = encoder.description(self._describe_devices(states))
        self._device_bytes = len(sections) + len(description)
        channel.send_many([end_of_ram, sections, encoder.end_of_stream(), description])
        sender.count()
        trace("snapshot.all-sent")
        self._check_cancelled()
        self._file.sync(channel.fileno())
        channel.close()  # for a command this is when it proves to have worked
        trace("snapshot.synced")

    def _publish(self) -> None:
        """Let the file be seen; from here on a cancel is too late."""
        self._check_cancelled()
        self._last_moment.decide()
        self._file.publish()
        trace("snapshot.published")

    def _check_complete(self) -> None:
        """Each page has been written once: an image that lacks one must not get its name."""
        self._check_cancelled()
        pages = self._counters.normal_pages + self._counters.zero_pages
        expected = self._counters.total_bytes // self._counters.page_bytes
        if pages != expected:
            raise PostcopyError(f"the snapshot has {pages} pages in place of {expected}")

    # --- when something went wrong

    def _check_cancelled(self) -> None:
        if self._cause is not None:
            raise self._cause
        if self.requests.cancelled:
            raise MigrationCancelled("cancelled by the user")

    def _stop_because(self, cause: PostcopyError) -> None:
        """Faults cannot be served any more: the writer is to stop."""
        self._cause = cause
        self._break_off()

    def _break_off(self) -> None:
        """Wake whoever waits for the sink, from any thread."""
        self._aside.close()
        channel = self._channel  # its own thread may let go of it meanwhile
        if channel is not None:
            channel.shutdown()

    def _fail(self, error: PostcopyError) -> None:
        cancelled = self._progress.status is Status.CANCELLING
        self.error = None if cancelled else self._cause or error
        self._clock.ended = time.monotonic()
        self._let_go()  # before anybody hears of the end
        self._progress.move(Status.CANCELLED if cancelled else Status.FAILED)

    def _let_go(self) -> None:
        if self._channel is not None:
            self._channel.shutdown()
            try:
                self._channel.close()
            except PostcopyError:
                pass  # it was over already
            self._channel = None
        self._file.end()
        while self._blocks:
            self._blocks.pop().close()

    def _measured(self) -> Measured:
        stalls = self._guard.stalls.figures() if self._guard is not None else None
        clock = self._clock
        stopped = clock.stopped and clock.handed_over
        return Measured(
            pause_us=round((clock.handed_over - clock.stopped) * 1e6) if stopped else None,
            write_faults=stalls.count if stalls is not None else None,
            write_stall_p50_us=stalls.p50_us if stalls is not None else None,
            write_stall_p99_us=stalls.p99_us if stalls is not None else None,
            write_stall_max_us=stalls.max_us if stalls is not None else None,
            aside_bytes=self._aside.total_bytes,
            aside_most_bytes=self._aside.most_bytes,
            device_bytes=self._device_bytes or None,
        )
