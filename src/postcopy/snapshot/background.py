"""A snapshot of a guest that goes on running: QEMU's ``background-snapshot``.

Threads: ``source`` runs :meth:`BackgroundSnapshot.run` and writes; ``snapshot-faults`` copies pages before
the guest overwrites them (:mod:`postcopy.snapshot.write_protect`).  The guest is stopped only while its
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
from postcopy.image.publish import CommitPoint
from postcopy.kernel.cpu_latency import CpusAwake
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.memory.ram_block import RamBlock
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.snapshot.bitmap import PageBatch, SnapshotBitmap
from postcopy.snapshot.cow_buffer import CowBuffer
from postcopy.snapshot.write_protect import WriteProtectHandler
from postcopy.source.connector import Connector
from postcopy.source.counters import Counters, Rate, StageTimes, describe
from postcopy.source.page_sink import PageSink, page_sink_for
from postcopy.source.switchover import device_sections
from postcopy.source.user_requests import UserRequests
from postcopy.statistics import Measured, MigrationInfo
from postcopy.status import Status, StatusMachine
from postcopy.stream import encoder
from postcopy.stream.encoder import stream_header
from postcopy.tls_options import TlsOptions
from postcopy.trace import trace

UNLIMITED = 0
"""As in QEMU: ``max-bandwidth`` is for migrations."""


class BackgroundSnapshot:
    """One background snapshot; the guest stays here in any case."""

    def __init__(
        self,
        guest: Guest,
        uri: str,
        capabilities: Capabilities,
        parameters: Parameters,
        progress: StatusMachine,
        describe_devices: Callable[[Sequence[DeviceState]], str],
        tls: TlsOptions | None = None,
    ) -> None:
        self._guest = guest
        self._address = parse(uri)
        self._file = PartialFile(self._address)
        self._commit_point = CommitPoint()
        self._capabilities = capabilities
        self._parameters = parameters
        self._progress = progress
        self._describe_devices = describe_devices
        self.requests = UserRequests()
        self._connector = Connector(self.requests, tls)
        self.error: PostcopyError | None = None
        self._counters = Counters()
        self._clock = StageTimes()
        self._cow_buffer = CowBuffer()
        self._device_bytes = 0
        # Set by the steps below, in this order.
        self._channel: Channel | None = None
        self._sender: PageSink | None = None
        self._blocks: list[RamBlock] = []
        self._bitmap: SnapshotBitmap | None = None
        self._handler: WriteProtectHandler | None = None
        self._cause: PostcopyError | None = None

    # --- called by the monitor, from other threads

    def cancel(self) -> None:
        """Cancel; without effect once the file is being published, or the snapshot has ended."""
        if self._commit_point.cancel(self._begin_cancel):
            self._break_off()

    def _begin_cancel(self) -> None:
        before = frozenset({Status.SETUP, Status.ACTIVE})
        if self._progress.move(Status.CANCELLING, only_from=before):
            self.requests.cancel()

    def pause(self) -> None:
        """Nothing: only a postcopy can be paused."""

    def set_parameters(self, parameters: Parameters) -> None:
        """Nothing: a snapshot keeps the parameters that it began with."""

    def leave(self) -> None:
        """End a command that writes the image, and remove the partial file: the engine ends."""
        self._connector.leave()
        self._file.end()

    @property
    def bitmap(self) -> SnapshotBitmap | None:
        """The pages that are still to be copied; None before the memory is mapped."""
        return self._bitmap

    def info(self) -> MigrationInfo:
        """Return the current figures."""
        remaining = self._bitmap.remaining_bytes if self._bitmap is not None else 0
        rate = self._sender.rate if self._sender is not None else Rate()
        info = describe(self._counters, rate, self._clock, self._progress.status, remaining)
        return replace(info, measured=self._measured())

    # --- the thread of the snapshot

    def run(self) -> None:
        """Take the snapshot; in any case the guest runs on afterwards, and no page is protected."""
        try:
            channel, sender = self._open()
            states = self._save(sender)
            self._finish(channel, sender, states)
            self._publish()
            self._clock.ended = time.monotonic()
            self._file.end()  # before the status tells of the end: the next may write there at once
            self._progress.move(Status.COMPLETED)
        except PostcopyError as error:
            self._fail(error)
        finally:
            self._release()

    def _open(self) -> tuple[Channel, PageSink]:
        """Connect, and send the start of the stream."""
        address = self._file.begin()
        self._channel = channel = (
            connect(address)  # returns when the file is open
            if self._file.ordinary
            else self._connector.connect(address)
        )
        channel.description = str(self._address)  # the URI of the order, for errors
        # The guest must not wait for a peer that has died.
        channel.watch(self._parameters.x_link_timeout / 1000)
        trace("snapshot.connected")
        self._sender = sender = page_sink_for(
            channel, self._capabilities, RateLimiter(UNLIMITED), self._counters
        )
        self._blocks = blocks = [RamBlock(region) for region in self._guest.regions()]
        self._bitmap = SnapshotBitmap(blocks)
        self._counters.total_bytes = self._bitmap.remaining_bytes
        self._check_cancelled()
        channel.send(
            stream_header(
                self._guest.machine_name,
                [block.page_size_bytes for block in blocks],
                self._capabilities,
                answered=False,
            )
        )
        sender.begin(blocks, postcopy=False)
        self._clock.set_up = time.monotonic()
        self._progress.move(Status.ACTIVE)
        trace("snapshot.active")
        return channel, sender

    def _save(self, sender: PageSink) -> Sequence[DeviceState]:
        """Write all pages as they are at one moment; return the device states of that moment."""
        try:
            (space,) = self._guest.watch_snapshot()
        except PostcopyError as error:
            self._guest.unwatch_snapshot()
            if isinstance(error, HostCannot):
                return self._save_still(sender, error)
            raise
        with self._watched(Userfaultfd.from_fd(space.userfaultfd)) as handler:
            handler.arm()
            trace("snapshot.armed")
            states = self._freeze(handler)
            self._write_pages(sender, handler.unprotect)
        return states

    def _save_still(self, sender: PageSink, lacking: HostCannot) -> Sequence[DeviceState]:
        """Write all pages of a guest that its user has stopped, and keep it stopped meanwhile.

        :param lacking: why this host cannot protect a running guest; raised if the guest runs.
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
        """Handle write faults of the guest's memory; at the end none of it is protected."""
        assert self._bitmap is not None
        try:
            self._handler = handler = WriteProtectHandler(
                userfaultfd, self._bitmap, self._cow_buffer, self._stop_because
            )
            handler.start()
            try:
                yield handler
            finally:
                handler.stop()
        finally:
            self._guest.unwatch_snapshot()  # vCPUs that still wait to write go on
        trace("snapshot.unwatched")

    def _freeze(self, handler: WriteProtectHandler) -> Sequence[DeviceState]:
        """Stop the guest, freeze memory and devices, resume it; return the device states."""
        self._check_cancelled()
        with closing(CpusAwake()) as awake:
            awake.a_while()
            self._clock.stopped = time.monotonic()
            try:
                # Devices first: one may write to memory while it is being saved.
                states = self._guest.pause_and_save()
                trace("snapshot.guest-stopped")
                handler.freeze()
                trace("snapshot.frozen")
            finally:
                self._guest.resume()
            self._clock.handed_over = time.monotonic()
        trace("snapshot.guest-resumed")
        return states

    def _write_pages(
        self, sender: PageSink, unprotect: Callable[[RamBlock, int, int], None]
    ) -> None:
        """Write all pages; copies that the fault handler has made go first, since they take memory.

        :param unprotect: called with pages that have been copied, and may be written to.
        """
        assert self._bitmap is not None
        for copies in self._bitmap.copy_rest():
            unprotect(copies.block, copies.first, copies.end)
            self._write(sender, copies)
            self._write_copies(sender, self._cow_buffer.take)
            trace("snapshot.writing")
        trace("snapshot.all-saved")
        self._write_copies(sender, self._cow_buffer.take_rest)
        self._check_complete()

    def _write_copies(self, sender: PageSink, take: Callable[[], PageBatch | None]) -> None:
        while (copies := take()) is not None:
            self._write(sender, copies)
            self._cow_buffer.written(copies)

    def _write(self, sender: PageSink, copies: PageBatch) -> None:
        self._check_cancelled()
        if len(copies.data):
            sender.send_copies(copies.block.name, copies.data, copies.contents)
        if len(copies.zeros):
            sender.send_zeros(copies.block.name, copies.zeros)
        sender.count()

    def _finish(self, channel: Channel, sender: PageSink, states: Sequence[DeviceState]) -> None:
        """Write the devices and the end of the stream, and wait until the sink has it all."""
        # As in QEMU, the stream of a background snapshot has no END section of RAM.
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
        channel.close()  # waits for the exit code of a command
        trace("snapshot.synced")

    def _publish(self) -> None:
        """Publish the file; from here on a cancel is too late."""
        self._check_cancelled()
        self._commit_point.commit()
        self._file.publish()
        trace("snapshot.published")

    def _check_complete(self) -> None:
        """Check that each page has been written once: an image that lacks one is not published."""
        self._check_cancelled()
        pages = self._counters.normal_pages + self._counters.zero_pages
        expected = self._counters.total_bytes // self._counters.page_bytes
        if pages != expected:
            raise PostcopyError(f"the snapshot has {pages} pages in place of {expected}")

    # --- errors and the end

    def _check_cancelled(self) -> None:
        if self._cause is not None:
            raise self._cause
        if self.requests.cancelled:
            raise MigrationCancelled("cancelled by the user")

    def _stop_because(self, cause: PostcopyError) -> None:
        """End the snapshot: its write faults cannot be served any more."""
        self._cause = cause
        self._break_off()

    def _break_off(self) -> None:
        """End every wait for the sink; callable from any thread."""
        self._cow_buffer.close()
        channel = self._channel  # its own thread may close it meanwhile
        if channel is not None:
            channel.shutdown()

    def _fail(self, error: PostcopyError) -> None:
        cancelled = self._progress.status is Status.CANCELLING
        self.error = None if cancelled else self._cause or error
        self._clock.ended = time.monotonic()
        self._release()  # before the status tells of the end
        self._progress.move(Status.CANCELLED if cancelled else Status.FAILED)

    def _release(self) -> None:
        if self._channel is not None:
            self._channel.shutdown()
            try:
                self._channel.close()
            except PostcopyError:
                pass  # it has failed already
            self._channel = None
        self._file.end()
        while self._blocks:
            self._blocks.pop().close()

    def _measured(self) -> Measured:
        stalls = self._handler.stalls.figures() if self._handler is not None else None
        clock = self._clock
        stopped = clock.stopped and clock.handed_over
        return Measured(
            pause_us=round((clock.handed_over - clock.stopped) * 1e6) if stopped else None,
            write_faults=stalls.count if stalls is not None else None,
            write_stall_p50_us=stalls.p50_us if stalls is not None else None,
            write_stall_p99_us=stalls.p99_us if stalls is not None else None,
            write_stall_max_us=stalls.max_us if stalls is not None else None,
            aside_bytes=self._cow_buffer.total_bytes,
            aside_most_bytes=self._cow_buffer.most_bytes,
            device_bytes=self._device_bytes or None,
        )
