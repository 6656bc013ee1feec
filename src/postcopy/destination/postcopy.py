"""Postcopy at the destination: the memory goes under userfaultfd, the devices load, the guest runs.

The package is loaded in two steps.  What must be done before another page may be placed (emptying what is
missing, starting the pager) happens at once, on the thread that reads the main channel.  Then the thread
``package`` loads the devices and runs the guest, while the first thread goes on reading: it brings the
pages that a device touches.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from postcopy.destination.incoming_ram import empty_missing
from postcopy.destination.return_path import ReturnPath
from postcopy.errors import ChannelBroken, HostCannot, PostcopyError, StreamError
from postcopy.guest import AddressSpace, DeviceState, Guest
from postcopy.kernel import threads
from postcopy.kernel.cpu_latency import CpusAwake
from postcopy.kernel.pagemap import PagemapScanner
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.paging.fault_table import FaultTable
from postcopy.paging.minor_faults import BackgroundMapper
from postcopy.paging.pager import Pager
from postcopy.paging.ram import IncomingRam, mapped_pages
from postcopy.paging.shared_space import SharedSpaces
from postcopy.parameters import Capabilities, Capability
from postcopy.statistics import Measured, MigrationInfo, WaitCause
from postcopy.status import Status, StatusMachine
from postcopy.stream import records
from postcopy.stream.decoder import Decoder
from postcopy.trace import trace


class Postcopy:
    """From LISTEN to the last page.

    :param on_failure: called when the package could not be loaded, to wake the main channel's reader.
    """

    def __init__(
        self,
        guest: Guest,
        ram: IncomingRam,
        faults: FaultTable,
        return_path: ReturnPath,
        progress: StatusMachine,
        on_failure: Callable[[], None],
    ) -> None:
        self._guest = guest
        self._on_failure = on_failure
        self._ram = ram
        self._faults = faults
        self._return_path = return_path
        self._progress = progress
        self._userfaultfd: Userfaultfd | None = None
        self.shared = SharedSpaces(ram)
        """The other processes whose faults are served."""
        self._pager: Pager | None = None
        self._pager_thread: threading.Thread | None = None
        self._serves = True  # no pager has failed since the last was started
        self._mapper: BackgroundMapper | None = None
        self._package_thread: threading.Thread | None = None
        self._awake = CpusAwake()
        self._deciding = threading.Lock()
        # Under the lock, from the package on: whether its guest shall not run here.
        self._given_up = False
        self.failure: PostcopyError | None = None
        self.listening = False
        self.finished = False
        """No page is missing, and nothing of this is left: a break changes nothing any more."""

    def prepare(self) -> None:
        """Register the memory (ADVISE): a host that cannot do postcopy fails now.

        Nothing has been received yet, so all is unmapped in the guest's process now, where it costs no
        downtime.
        """
        self._watch(self._guest.watch_missing())
        self._guest.unmap_missing()

    def _watch(self, spaces: Sequence[AddressSpace]) -> tuple[Userfaultfd, int]:
        """Take the address spaces whose faults are to be served; return the guest's own and its process."""
        own, *others = spaces
        self._userfaultfd = Userfaultfd.from_fd(own.userfaultfd)
        for space in others:
            self.shared.add(space)
        return self._userfaultfd, own.process_id

    def expect_guest(self) -> None:
        """The guest is about to stop at the source: keep CPUs out of idle states meanwhile."""
        self._awake.a_while()

    def take_package(self, decoder: Decoder, data: bytes) -> Userfaultfd:
        """Listen, and begin to load what the package holds.

        :return: the userfaultfd through which pages are placed from now on.
        """
        decoder.feed(data)
        if not isinstance(decoder.next_record(), records.PostcopyListen):
            raise StreamError("the package does not begin with POSTCOPY_LISTEN")
        if self._userfaultfd is None or not self._return_path.is_open or self.listening:
            raise StreamError("CMD_POSTCOPY_LISTEN in wrong postcopy state")
        self._start_pager(self._userfaultfd)
        self.listening = True
        self._progress.move(Status.POSTCOPY_DEVICE)
        trace("destination.listening")
        self._package_thread = _start("package", lambda: self._load(decoder))
        return self._userfaultfd

    @property
    def userfaultfd(self) -> Userfaultfd:
        """Through which pages are placed, from :meth:`take_package` or :meth:`adopt` on."""
        assert self._userfaultfd is not None
        return self._userfaultfd

    @property
    def mapper(self) -> BackgroundMapper:
        """Maps pages that no thread waits for, from the same moment on."""
        assert self._mapper is not None
        return self._mapper

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait until the package has either run the guest or failed: nothing between the two.

        :return: whether it has, within the time.
        """
        if self._package_thread is not None:
            self._package_thread.join(timeout_s)
            return not self._package_thread.is_alive()
        return True

    def give_up_package(self) -> bool:
        """A device waits for a page that does not come: let the guest not run here, unless it does.

        :return: whether it never will.  The thread that loads the package still waits then, until the
            memory is unregistered.
        """
        with self._deciding:
            waits = self._ram.any_expected() or not self._serves
            self._given_up = self._progress.status is Status.POSTCOPY_DEVICE and waits
            return self._given_up

    def adopt(self) -> Userfaultfd:
        """Take over from an engine that has died while the guest ran here.

        Every page that it had requested is requested again: each thread that waits is woken, and faults
        once more.
        """
        userfaultfd, process_id = self._watch(self._guest.watch_missing(only_still=True))
        self.listening = True
        with PagemapScanner(process_id) as scanner:
            for paged in self._ram:
                paged.adopt(mapped_pages(scanner, paged.block))
        self._start_pager(userfaultfd)
        self._repeat_faults(userfaultfd)
        self.mapper.start()
        return userfaultfd

    def serve_again(self) -> None:
        """Another connection begins: serve again what a failed call has left unserved.

        A page may have been received and not been mapped for its waiters; the pager may have ended.
        """
        if not self._serves:
            self._end_pager()
            self.failure = None
            self._start_pager(self.userfaultfd)
        self._repeat_faults(self.userfaultfd)

    def _repeat_faults(self, userfaultfd: Userfaultfd) -> None:
        """Have every thread that waits for a page fault once more."""
        for paged in self._ram:
            userfaultfd.wake(paged.block.host_address, paged.block.size_bytes)
        self.shared.wake_all()

    def ask_again(self) -> None:
        """Request again every page that was requested and not received: the recovery is done."""
        if self._pager is not None:
            self._pager.ask_again()

    def waits_for(self, cause: WaitCause) -> None:
        """From now on threads that wait for a page do so for this."""
        self._faults.blocktime.because(cause, time.monotonic_ns())

    def finish(self) -> None:
        """All pages have been sent: unregister the memory from the userfaultfd.

        A page that was never sent was zero at the source; its memory is emptied, so it reads as zeros.

        :raises PostcopyError: the package could not be loaded.
        """
        if self.finished:
            return
        self.settle()
        if self.failure is not None:
            raise self.failure
        empty_missing(self._ram)
        # No thread may map pages in memory that is not registered; to unregister it wakes all waiters.
        self._stop_serving()
        self._guest.unwatch_missing()
        self.close()
        self.finished = True

    def close(self) -> None:
        """Stop the pager and close the userfaultfds."""
        self._stop_serving()
        if self._userfaultfd is not None:
            self._userfaultfd.close()
            self._userfaultfd = None
        self.shared.close()

    def _stop_serving(self) -> None:
        if self._mapper is not None:
            self._mapper.stop()
        self._end_pager()
        self._awake.close()

    def _end_pager(self) -> None:
        if self._pager is not None and self._pager_thread is not None:
            self._pager.stop()
            self._pager_thread.join()
            self._pager = None

    def info(self, status: Status, capabilities: Capabilities) -> MigrationInfo:
        """What ``query-migrate`` says at the destination."""
        info = MigrationInfo(status=status, incoming=True)
        if not capabilities.enabled(Capability.POSTCOPY_BLOCKTIME):
            return info
        report = self._faults.blocktime.report(time.monotonic_ns())
        measured = Measured(
            blocktime_us=report.vcpu_us,
            blocktime_causes_us=report.causes_us,
            overlapped_blocktime_us=report.overlapped_us,
            fault_latency_p50_us=report.p50_us,
            fault_latency_p99_us=report.p99_us,
            fault_latency_max_us=report.max_us,
            fault_latency_dist=report.distribution,
        )
        return replace(
            info,
            postcopy_blocktime_ms=report.overlapped_us // 1000,
            postcopy_vcpu_blocktime_ms=tuple(us // 1000 for us in report.vcpu_us),
            postcopy_latency_ns=report.mean_ns,
            postcopy_non_vcpu_latency_ns=report.others_mean_ns,
            postcopy_vcpu_latency_ns=report.vcpu_mean_ns,
            postcopy_latency_dist=report.distribution,
            measured=measured,
        )

    def _start_pager(self, userfaultfd: Userfaultfd) -> None:
        source = self._return_path
        pager = Pager(userfaultfd, self._ram, self._faults, source, self._awake, self.shared)
        self._serves = True
        try:
            self._pager_thread = _start("pager", lambda: self._serve(pager))
        except HostCannot:
            self._serves = False
            pager.discard()
            raise
        self._pager = pager
        if self._mapper is None:
            self._mapper = BackgroundMapper(userfaultfd, self._ram)

    def _serve(self, pager: Pager) -> None:
        try:
            pager.run()
        except PostcopyError as error:
            self.failure = error
            self._serves = False
            self._on_failure()

    # --- the thread "package"

    def _load(self, decoder: Decoder) -> None:
        try:
            self._load_package(decoder)
        except PostcopyError as error:
            self.failure = error
            self._refuse()
            self._on_failure()

    def _refuse(self) -> None:
        """Tell the source that its guest will not run here, unless it has been told the contrary.

        This thread reports it: the thread that reads the channel can only be woken by a break.
        """
        if self._progress.status is Status.POSTCOPY_DEVICE:
            with suppress(ChannelBroken):
                self._return_path.shut(failed=True)

    def _load_package(self, decoder: Decoder) -> None:
        devices, pings = _unpack(decoder)
        self._guest.load_devices(devices)
        trace("destination.package-loaded")
        with self._deciding:
            if self._given_up:
                raise ChannelBroken("the link broke while a device waited for a page")
            # Before the pong: should this engine die after it, the guest's process knows already that it
            # owns the guest which the source has given up.
            self._progress.move(Status.POSTCOPY_ACTIVE)
        trace("destination.owning")
        resuming = self._guest.begin_to_resume()
        try:
            for ping in pings:
                self._return_path.pong(ping)
        except ChannelBroken:
            pass  # this side owns the guest all the same; the reader of the channel pauses the migration
        trace("destination.package-taken")
        resuming.wait()
        self.mapper.start()
        trace("destination.running")


def _unpack(decoder: Decoder) -> tuple[list[DeviceState], list[int]]:
    """Take a package apart, up to RUN: the devices, and the pings to answer when they are loaded."""
    devices: list[DeviceState] = []
    pings: list[int] = []
    while not isinstance(record := decoder.next_record(), records.PostcopyRun):
        if record is None:
            decoder.finish()
            raise StreamError("the package ends without POSTCOPY_RUN")
        if isinstance(record, records.DeviceSection):
            devices.append(
                DeviceState(record.name, record.instance, record.version, record.payload)
            )
        elif isinstance(record, records.Ping):
            pings.append(record.value)
    return devices, pings


def _start(name: str, run: Callable[[], None]) -> threading.Thread:
    return threads.start(threading.Thread(target=run, name=name, daemon=True))
