"""The machine's virtio device in another process: a vhost-user back end does the requests of its rings.

A thread of the guest's process asks the back end for all that it is to do, and waits for its answers: it
starts the rings when the driver and the guest are ready, stops them when the guest stands still, and looks
for another back end when this one has ended.  It may wait for a missing page, its own or the back end's,
and holds no lock then.
"""

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from postcopy.errors import KernelError, PostcopyError, RingError
from postcopy.kernel import calls, threads
from postcopy.machine.back_ends import BackEnds
from postcopy.machine.guest_memory import GuestMemory
from postcopy.machine.vcpu import NOT_COME
from postcopy.machine.virtio_mmio import REQUEST_DONE
from postcopy.machine.virtio_state import RingState
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


class VhostUserDevice:
    """:class:`postcopy.machine.virtio_mmio.Queues`, and a :class:`~postcopy.machine.vcpu.Runner`.

    Invariant, kept under ``_changed``: the back end touches guest memory only while ``_served``, and the
    thread only while ``_busy`` or ``_served``.

    :param memory: for the indices of the rings; the rest of it is the back end's.
    :param back_ends: is connected to the first.
    :param on_lost: gets the reason why the guest cannot go on.
    """

    def __init__(
        self, memory: GuestMemory, back_ends: BackEnds, on_lost: Callable[[str], None]
    ) -> None:
        kind = self._kind = back_ends.kind
        self.name = f"the vhost-user {kind.name} {back_ends.path}"
        self.device_id, self.section = kind.device_id, kind.section
        self.queues, self.most_entries = kind.queues, kind.most_entries
        self._memory = memory
        self._back_ends = back_ends
        self._on_lost = on_lost
        self._interrupt: Callable[[int], None] = lambda _: None
        self._broken: Callable[[RingError], None] = lambda _: None
        self._changed = threading.Condition()
        self._wanted = self._parking = self._held = False
        self._suspended = 0  # by drivers that reset the device, and by saves and loads
        self._rings: Sequence[RingState] = ()
        self._driver_features = 0
        self._bases: Sequence[int] = ()
        self._served = self._busy = self._closing = self._closed = False
        self._lost = False  # the back end has gone, and only the used rings say what it has done
        self._retry_s = _RETRY_S
        self.features, self.config = back_ends.features, back_ends.config
        self._fds = calls.open_all(_eventfd, ("wake", "call", *kind.queues * ("kick",)))
        self._wake_fd, self._call_fd, *kicks = self._fds
        self.kick_fds = tuple(kicks)
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
        """Stop the rings and wait until they are; the vCPUs have parked, else requests come without end."""
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

    # --- postcopy.machine.virtio_mmio.Queues

    @property
    def runner(self) -> "VhostUserDevice":
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        return self

    def report_to(
        self, interrupt: Callable[[int], None], broken: Callable[[RingError], None]
    ) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        self._interrupt, self._broken = interrupt, broken

    def kick(self, number: int) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        with self._changed:
            if not self._closing:
                os.eventfd_write(self.kick_fds[number], 1)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        with self._changed:
            self._suspended += 1
            self.wake()
            try:
                self._changed.wait_for(self._is_still)
                yield
            finally:
                self._suspended -= 1
                self.wake()

    def serve(self, rings: Sequence[RingState], features: int) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        self._rings, self._driver_features = rings, features
        self._bases = [ring.next_available for ring in rings]

    def next_available(self) -> Sequence[int]:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        return self._bases

    def check_config(self, config: bytes) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        self._back_ends.check_config(config)

    def announce(self) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        process = self._back_ends.process
        if process is not None:
            with contextlib.suppress(
                PostcopyError
            ):  # a lost one is replaced, and a later round is for that
                process.announce(self.config)

    def flush(self) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`: vhost-user has no message for that."""

    def close(self) -> bool:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
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
            self._on_lost(f"a ring of {self.name} is on a page that is lost: {error}")
        except Exception as error:
            _log.exception("%s cannot go on", self.name)
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
        if not self._rings or self._suspended or (self._held and not self._served):
            return False
        return self._wanted or (self._served and not self._parking)

    def _wait(self, timeout_s: float | None = None) -> None:
        """Until there is something to do, or the back end has gone."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        poll.register(self._call_fd, select.POLLIN)
        process = self._back_ends.process
        connection = None
        if process is not None and process.failure is None:
            connection = process.connection
            if connection is not None and (fd := connection.fileno()) >= 0:  # else just closed
                poll.register(fd, select.POLLRDHUP)
        ready = {fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
        for fd in ready & {self._wake_fd, self._call_fd}:
            os.eventfd_read(fd)
        if self._call_fd in ready:
            self._interrupt(REQUEST_DONE)
        others = ready - {self._wake_fd, self._call_fd}
        if others and process is not None and process.connection is connection:
            process.fail("it has closed the connection")

    def _start(self) -> None:
        process = self._back_ends.process
        assert process is not None
        served = True  # perhaps, if the start has failed
        try:
            for ring in self._rings:
                self._check(ring)
            if self._lost:
                self._settle()
            # Some that it does not offer are the front end's alone, such as the address of a network.
            features = self._driver_features & process.features
            process.start_rings(self._vhost_rings(), features)
        except RingError as error:
            self._broken(error)
            self._rings, self._bases, served = (), (), False
        except PostcopyError:
            pass  # it is lost: that is the next step
        else:
            self._retry_s = _RETRY_S
            self._kick_all()  # what is in the rings already
        with self._changed:
            self._served, self._busy = served, False
            self._changed.notify_all()

    def _vhost_rings(self) -> list[Ring]:
        return [
            Ring(
                number,
                ring.entries,
                ring.descriptors,
                ring.available,
                ring.used,
                self._bases[number],
                self.kick_fds[number],
                self._call_fd,
            )
            for number, ring in enumerate(self._rings)
        ]

    def _kick_all(self) -> None:
        for number in range(self.queues):
            self.kick(number)

    def _check(self, ring: RingState) -> None:
        check_entries(ring.entries)
        layout, memory = RingLayout(ring.entries), self._memory
        memory.area(ring.descriptors, layout.descriptors_bytes, 16)
        memory.area(ring.available, layout.available_bytes, 2)
        memory.area(ring.used, layout.used_bytes, 4)

    def _stop(self) -> None:
        """Stop the rings when no request is under way; some back ends would do it later else."""
        process = self._back_ends.process
        assert process is not None
        if not self._drain(process):
            return
        try:
            bases = process.stop_rings()
        except PostcopyError:
            return  # it is lost: that is the next step
        used = self._used_indices()
        if bases != used:
            process.fail(
                f"it says that requests {bases} are next, one a ring, and has done all before {used}"
            )
            return
        with self._changed:
            self._served, self._bases = False, bases
            self._changed.notify_all()

    def _drain(self, process: BackEndProcess) -> bool:
        """Wait until every request is done; return False if the rings are not to be stopped any more.

        Frames of a network can stay where they are: the next back end sends them.
        """
        self._kick_all()  # a vCPU may have been stopped between the index of a request and its kick
        pause_s, until_s = _LOOK_S, time.monotonic() + _RESET_S
        while self._kind.is_drained and self._used_indices() != self._available_indices():
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

    def _used_indices(self) -> list[int]:
        return [self._memory.load(ring.used + _INDEX_AT, 2) for ring in self._rings]

    def _available_indices(self) -> list[int]:
        return [self._memory.load(ring.available + _INDEX_AT, 2) for ring in self._rings]

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
        bases = self._used_indices()
        with self._changed:
            self._lost, self._bases = False, bases
            self._changed.notify_all()

    def _find(self) -> None:
        """Connect to the next back end, or wait a moment."""
        if not self._back_ends.find():
            self._pause()

    def _pause(self) -> None:
        """A moment, which is longer each time until the rings have been started."""
        self._wait(self._retry_s)
        self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)


def _eventfd(_: str) -> int:
    return calls.of_python("eventfd", "", os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
