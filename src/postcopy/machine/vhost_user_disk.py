"""The machine's drive in another process: a vhost-user back end does the requests of the ring.

A thread of the guest's process asks the back end for all that it is to do, and waits for its answers: it
starts the ring when the driver and the guest are ready, stops it when the guest stands still, and looks for
another back end when this one has ended.  It may wait for a missing page, its own or the back end's, and
holds no lock then.
"""

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from postcopy.errors import KernelError, PostcopyError, RingError
from postcopy.kernel import calls, threads
from postcopy.machine.back_ends import BackEnds
from postcopy.machine.guest_memory import GuestMemory
from postcopy.machine.vcpu import NOT_COME
from postcopy.machine.virtio_mmio import REQUEST_DONE
from postcopy.machine.virtio_state import DEFAULT_VHOST_USER_ENTRIES, VHOST_USER_BLK, RingState
from postcopy.vhost_user.back_end_process import BackEndProcess
from postcopy.vhost_user.front_end import Ring
from postcopy.virtio.ring import RingLayout
from postcopy.virtio.ring import check_size as check_entries

_log = logging.getLogger(__name__)

_INDEX_AT: Final = 2  # of both rings
_PAGE_BYTES: Final = 4096
_LOOK_S: Final = 0.0005
_LONGEST_LOOK_S: Final = 0.01
_RETRY_S: Final = 0.05
_LONGEST_RETRY_S: Final = 1.0
_RESET_S: Final = 5.0
"""A driver that resets the device waits so long for its requests; then the connection is closed."""
_CLOSE_S: Final = 4.0


class VhostUserDisk:
    """:class:`postcopy.machine.virtio_mmio.Queue`, and a :class:`~postcopy.machine.vcpu.Runner`.

    Invariant, kept under ``_changed``: the back end touches guest memory only while ``_served``, and the
    thread only while ``_busy`` or ``_served``.

    :param memory: for the indices of the ring; the rest of it is the back end's.
    :param back_ends: is connected to the first.
    :param on_lost: gets the reason why the guest cannot go on.
    """

    device_id = 2
    section = VHOST_USER_BLK
    most_entries = DEFAULT_VHOST_USER_ENTRIES

    def __init__(
        self, memory: GuestMemory, back_ends: BackEnds, on_lost: Callable[[str], None]
    ) -> None:
        self.name = f"the vhost-user disk {back_ends.path}"
        self._memory = memory
        self._back_ends = back_ends
        self._on_lost = on_lost
        self._interrupt: Callable[[int], None] = lambda _: None
        self._broken: Callable[[RingError], None] = lambda _: None
        self._changed = threading.Condition()
        self._wanted = self._parking = self._held = False
        self._suspended = 0  # by drivers that reset the device, and by saves and loads
        self._ring: RingState | None = None
        self._ring_features = 0
        self._base = 0
        self._served = self._busy = self._closing = self._closed = False
        self._lost = False  # the back end has gone, and only the used ring says what it has done
        self._retry_s = _RETRY_S
        self.features, self.config = back_ends.features, back_ends.config
        self._fds = calls.open_all(_eventfd, ("kick", "call", "wake"))
        self.kick_fd, self._call_fd, self._wake_fd = self._fds
        self._thread = threading.Thread(target=self._run, name="vhost-user", daemon=True)
        try:
            back_ends.begin(self)
            threads.start(self._thread)
        except BaseException:
            back_ends.let_go()
            calls.close_all(self._fds)
            raise

    # --- postcopy.machine.vcpu.Runner

    @property
    def awaits(self) -> str:
        """See :class:`~postcopy.machine.vcpu.Runner`."""
        address = self._memory.waits_at
        if address is not None:
            return f"the guest's page at {address & -_PAGE_BYTES:#x} {NOT_COME}"
        process = self._back_ends.process
        who = "a back end" if process is None else process.name
        return (
            f"{who}, which has requests in flight or does not answer; see what it does (it may wait for a "
            "page), and stop the guest then"
        )

    def want(self) -> None:
        """See :class:`~postcopy.machine.vcpu.Runner`."""
        with self._changed:
            self._wanted, self._parking = True, False
            self.wake()

    def unwant(self) -> None:
        """See :class:`~postcopy.machine.vcpu.Runner`; the requests end when the vCPUs have parked."""
        with self._changed:
            self._wanted = False

    def wait_parked(self, timeout_s: float | None = None) -> bool:
        """Stop the ring and wait until it is; the vCPUs have parked, else requests come without end."""
        with self._changed:
            self._parking = not self._wanted
            self.wake()
            return self._changed.wait_for(self._is_still, timeout_s)

    def hold(self) -> None:
        """See :class:`postcopy.guest.SharingProcess`."""
        with self._changed:
            self._held = True

    def release(self) -> None:
        """See :class:`postcopy.guest.SharingProcess`."""
        with self._changed:
            self._held = False
            self.wake()

    def _is_still(self) -> bool:
        return not (self._served or self._busy or self._lost)

    # --- postcopy.machine.virtio_mmio.Queue

    @property
    def runner(self) -> "VhostUserDisk":
        """See :class:`~postcopy.machine.virtio_mmio.Queue`."""
        return self

    def report_to(
        self, interrupt: Callable[[int], None], broken: Callable[[RingError], None]
    ) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queue`."""
        self._interrupt, self._broken = interrupt, broken

    def kick(self) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queue`."""
        with self._changed:
            if not self._closing:
                os.eventfd_write(self.kick_fd, 1)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """See :class:`~postcopy.machine.virtio_mmio.Queue`."""
        with self._changed:
            self._suspended += 1
            self.wake()
            try:
                self._changed.wait_for(self._is_still)
                yield
            finally:
                self._suspended -= 1
                self.wake()

    def serve(self, ring: RingState | None, features: int) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queue`."""
        self._ring, self._ring_features = ring, features
        if ring is not None:
            self._base = ring.next_available

    def next_available(self) -> int | None:
        """See :class:`~postcopy.machine.virtio_mmio.Queue`."""
        return None if self._ring is None else self._base

    def check_config(self, config: bytes) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queue`."""
        self._back_ends.check_config(config)

    def flush(self) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queue`: vhost-user has no message for that."""

    def close(self) -> bool:
        """See :class:`~postcopy.machine.virtio_mmio.Queue`."""
        with self._changed:
            self._wanted, self._closing = False, True
            self.wake()
        process = self._back_ends.process
        if process is not None:
            process.fail("the machine is being closed")
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            return False
        with self._changed:
            self._closed = True
        calls.close_all(self._fds)
        return True

    def wake(self) -> None:
        """Have the thread look what is to be done.  Any thread; harmless when closed."""
        with self._changed:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    # --- the thread

    def _run(self) -> None:
        try:
            while (step := self._next_step()) is not None:
                step()
        except KernelError as error:
            self._on_lost(f"a ring of the drive is on a page that is lost: {error}")
        except Exception as error:
            _log.exception("the drive cannot go on")
            self._on_lost(f"{self.name} cannot go on: {type(error).__name__}: {error}")
        finally:
            self._back_ends.let_go()
            with self._changed:
                self._served = self._busy = self._lost = False
                self._changed.notify_all()

    def _next_step(self) -> Callable[[], None] | None:
        with self._changed:
            if self._closing:
                return None
            process = self._back_ends.process
            if process is not None and process.failure is not None:
                return self._lose
            if self._lost and (self._suspended or self._parking):
                return self._settle
            if process is None:
                return self._find
            if self._served is self._may_serve():
                return self._wait
            self._busy = not self._served
            return self._start if self._busy else self._stop

    def _may_serve(self) -> bool:
        if self._ring is None or self._suspended or (self._held and not self._served):
            return False
        return self._wanted or (self._served and not self._parking)

    def _wait(self, timeout_s: float | None = None) -> None:
        """Until there is something to do, or the back end has gone."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        poll.register(self._call_fd, select.POLLIN)
        process = self._back_ends.process
        connections = 0
        if process is not None and process.failure is None:
            connections = process.connections
            if (connected := process.fileno()) >= 0:
                poll.register(connected, select.POLLRDHUP)
        ready = {fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
        for fd in ready & {self._wake_fd, self._call_fd}:
            os.eventfd_read(fd)
        if self._call_fd in ready:
            self._interrupt(REQUEST_DONE)
        others = ready - {self._wake_fd, self._call_fd}
        if others and process is not None and process.connections == connections:
            process.fail("it has closed the connection")

    def _start(self) -> None:
        process, state, features = self._back_ends.process, self._ring, self._ring_features
        assert process is not None
        assert state is not None
        served = True  # perhaps, if the start has failed
        try:
            self._check(state)
            if self._lost:
                self._settle()
            ring = Ring(state.entries, state.descriptors, state.available, state.used, features)
            process.start_ring(ring, self._base, self.kick_fd, self._call_fd)
        except RingError as error:
            self._broken(error)
            self._ring, served = None, False
        except PostcopyError:
            pass  # it is lost: that is the next step
        else:
            self._retry_s = _RETRY_S
            self.kick()  # what is in the ring already
        with self._changed:
            self._served, self._busy = served, False
            self._changed.notify_all()

    def _check(self, ring: RingState) -> None:
        check_entries(ring.entries)
        layout, memory = RingLayout(ring.entries), self._memory
        memory.area(ring.descriptors, layout.descriptors_bytes, 16)
        memory.area(ring.available, layout.available_bytes, 2)
        memory.area(ring.used, layout.used_bytes, 4)

    def _stop(self) -> None:
        """Stop the ring when no request is under way; some back ends would do it later else."""
        process = self._back_ends.process
        assert process is not None
        if not self._drain(process):
            return
        try:
            base = process.stop_ring()
            if base != self._used_index():
                process.fail(f"it says that request {base} is next, and has done all of them")
                return
        except PostcopyError:
            return  # it is lost: that is the next step
        with self._changed:
            self._served, self._base = False, base
            self._changed.notify_all()

    def _drain(self, process: BackEndProcess) -> bool:
        """Wait until every request is done; return False if the ring is not to be stopped any more."""
        self.kick()  # a vCPU may have been stopped between the index of a request and its kick
        pause_s, until_s = _LOOK_S, time.monotonic() + _RESET_S
        while self._used_index() != self._available_index():
            with self._changed:
                if self._closing or self._may_serve() or process.failure is not None:
                    return False
                suspended = self._suspended
            if suspended and time.monotonic() > until_s:
                process.fail(f"requests were in flight {_RESET_S:g} s after a reset by the driver")
                return False
            self._wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_LOOK_S)
        return True

    def _used_index(self) -> int:
        assert self._ring is not None
        return self._memory.load(self._ring.used + _INDEX_AT, 2)

    def _available_index(self) -> int:
        assert self._ring is not None
        return self._memory.load(self._ring.available + _INDEX_AT, 2)

    # --- another back end

    def _lose(self) -> None:
        """The back end has gone: requests that it has not done are to be done again.

        What those are is looked at as late as can be: it may have ended some since the connection closed.
        """
        self._back_ends.lose()
        with self._changed:
            self._lost, self._served = self._lost or self._served, False
            self._changed.notify_all()
        self._pause()

    def _settle(self) -> None:
        base = self._used_index()
        with self._changed:
            self._lost, self._base = False, base
            self._changed.notify_all()

    def _find(self) -> None:
        """Connect to the next back end, or wait a moment."""
        if not self._back_ends.find():
            self._pause()

    def _pause(self) -> None:
        """A moment, which is longer each time until a ring has been started."""
        self._wait(self._retry_s)
        self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)


def _eventfd(_: str) -> int:
    return calls.of_python("eventfd", "", os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
