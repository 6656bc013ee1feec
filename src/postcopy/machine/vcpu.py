"""One vCPU and the thread that runs it, for the machine's whole life."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from postcopy.errors import GuestError, WrongState
from postcopy.guest import VcpuThread
from postcopy.kernel import threads
from postcopy.machine.cpu import Cpu, Exit, ExitReason
from postcopy.machine.cpu_state import CpuState

KICK = signal.SIGUSR1
"""Makes ``KVM_RUN`` return."""


def _ignore(_number: int, _frame: object) -> None:
    """The kernel call has been interrupted, which is all that is wanted."""


def install_kick_handler() -> None:
    """Handle ``SIGUSR1`` and ``SIGBUS``.  Call it in the main thread, before any machine is made.

    The kernel sends ``SIGBUS`` to a vCPU that touches a poisoned page.  A handler in Python keeps either
    signal from ending the process, and makes the interrupted kernel call return; it does nothing itself.
    For a plain thread that touches such a page it is of no use: the access is tried again, for ever.  So
    only vCPUs and engines read guest memory that may be poisoned.

    Machines made in the main thread call this themselves; a second call has no effect.

    :raises WrongState: this is another thread, where Python installs no handlers, and the main
        thread has not called it.
    """
    if signal.getsignal(KICK) is _ignore and signal.getsignal(signal.SIGBUS) is _ignore:
        return
    if threading.current_thread() is not threading.main_thread():
        raise WrongState(
            "signal handlers can only be installed in the main thread; "
            "call postcopy.machine.vcpu.install_kick_handler() there first"
        )
    signal.signal(KICK, _ignore)
    signal.signal(signal.SIGBUS, _ignore)


_log = logging.getLogger(__name__)

NOT_COME = (
    "that has not come; let the page come (recover the migration) or declare it lost (x-migrate-lost), and "
    "stop the guest then"
)
"""Of a page, with the cure."""

MOST_VAIN_INTERRUPTS = 16
"""Interrupts without a cause at one instruction that a vCPU outlives; more mean a poisoned page."""


class Vcpu:
    """A vCPU that runs when it is wanted and is parked when not.

    Invariant, kept under one lock: ``_inside`` while its thread is in the guest or on its way, and
    then no other thread touches the CPU; ``_over`` from when its thread will not come back to the CPU, and
    then the CPU is not kicked: that would be a signal to a thread that may have ended.  :meth:`want` and
    :meth:`unwant` may come from any thread and at any time, :meth:`wait_parked` from any but this vCPU's
    own.  No exception ends the thread: the guest has ended then, and ``on_end`` is told why.

    :param on_end: called on the vCPU's thread when the guest cannot go on (``SHUTDOWN``,
        ``FAILED``); it must not wait for this vCPU.
    :raises HostCannot: there can be no more threads.
    """

    def __init__(self, index: int, cpu: Cpu, on_end: Callable[["Vcpu", Exit], None]) -> None:
        self.index = index
        self.name = f"vCPU {index}"
        self.awaits = f"a page of the guest's page tables {NOT_COME}"
        self._cpu = cpu
        self._on_end = on_end
        self._changed = threading.Condition()
        self._wanted = False
        self._held = False
        self._left_to_be_held = False
        self._inside = False
        self._halted = False
        self._ended = False
        self._closing = False
        self._over = False
        self._vain_interrupts = 0
        self._vain_address = 0
        self._thread = threading.Thread(target=self.run, name=f"vcpu-{index}", daemon=True)
        threads.start(self._thread)

    def run(self) -> None:
        """The thread: into the guest, out again, and see why."""
        try:
            while self._wait_until_wanted():
                self._run_once()
        finally:
            with self._changed:
                self._inside, self._over = False, True
                self._changed.notify_all()

    def _run_once(self) -> None:
        exit_ = self._enter()
        if exit_.reason is ExitReason.HALTED:
            self._halted = True
        elif exit_.reason is not ExitReason.INTERRUPTED:
            self._ended = True
            try:
                self._on_end(self, exit_)
            except Exception:
                _log.exception("vCPU %d has ended, and its machine could not be told", self.index)

    def _enter(self) -> Exit:
        try:
            # Only an interrupted CPU is whole: an IN that was served still waits for its answer.
            exit_ = self._cpu.enter()
            while exit_.reason is ExitReason.SERVED:
                exit_ = self._cpu.enter()
            return self._unless_in_vain(exit_)
        except Exception as error:
            _log.exception("vCPU %d cannot go on", self.index)
            return Exit(ExitReason.FAILED, f"{type(error).__name__}: {error}")

    def want(self) -> None:
        """Let the vCPU run, unless the guest has halted it or it has ended."""
        with self._changed:
            self._wanted = True
            if not self._over and not self._held:
                self._cpu.unkick()
            self._changed.notify_all()

    def unwant(self) -> None:
        """Ask the vCPU to park; see :meth:`wait_parked`."""
        with self._changed:
            self._wanted = False
            if not self._over:
                self._cpu.kick()
            self._changed.notify_all()

    def hold(self) -> None:
        """Let the vCPU leave the guest until :meth:`release`, wanted or not; does not wait."""
        with self._changed:
            self._held = self._left_to_be_held = True
            if not self._over:
                self._cpu.kick()

    def release(self) -> None:
        """Let the vCPU run again, if it is wanted."""
        with self._changed:
            self._held = False
            if self._wanted and not self._over:
                self._cpu.unkick()
            self._changed.notify_all()

    def wait_parked(self, timeout_s: float | None = None) -> bool:
        """Wait until the vCPU is out of the guest and touches no memory; return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._inside, timeout_s)

    @property
    def thread(self) -> VcpuThread:
        """The kernel's number of the thread: faults of this vCPU are reported under it."""
        return VcpuThread(self.index, self._thread.native_id or 0)

    def get_state(self) -> CpuState:
        """The state of a parked vCPU."""
        return replace(self._cpu.get_state(), halted=int(self._halted))

    def set_state(self, state: CpuState) -> None:
        """Give a parked vCPU another state.

        :raises GuestError: this CPU cannot have it.
        """
        self._cpu.set_state(state)
        self._halted = bool(state.halted)
        self._ended = False

    def close(self) -> None:
        """End the thread and give the CPU back; to want or unwant it later changes nothing."""
        with self._changed:
            self._closing = True
        self.unwant()
        self._thread.join()
        self._cpu.close()

    def _wait_until_wanted(self) -> bool:
        with self._changed:
            self._inside = False
            if not self._may_run():
                self._vain_interrupts = 0
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closing or self._may_run())
            self._inside = not self._closing
            return self._inside

    def _may_run(self) -> bool:
        return self._wanted and not (self._held or self._halted or self._ended or self._closing)

    def _unless_in_vain(self, exit_: Exit) -> Exit:
        # A vCPU that touches a poisoned page is interrupted by SIGBUS each time it tries.  The
        # kernel does not tell us the page, but there is no way past that instruction.
        if exit_.reason is not ExitReason.INTERRUPTED or not self._wanted:
            return exit_
        if self._left_to_be_held:
            self._left_to_be_held = False
            return exit_
        address = self._cpu.get_state().rip
        if address != self._vain_address:
            self._vain_address, self._vain_interrupts = address, 0
        self._vain_interrupts += 1
        if self._vain_interrupts <= MOST_VAIN_INTERRUPTS:
            return exit_
        self._vain_interrupts = 0
        what = f"the instruction at {address:#x} touches a page that is lost (poisoned)"
        return Exit(ExitReason.FAILED, what)


class Runner(Protocol):
    """What runs with the guest and stands still with it: a vCPU, the thread of a device."""

    @property
    def name(self) -> str:
        """Of it, for a user."""

    @property
    def awaits(self) -> str:
        """What it waits for if :meth:`wait_parked` waits long, and the cure."""

    def want(self) -> None:
        """Let it run."""

    def unwant(self) -> None:
        """Ask it to park."""

    def wait_parked(self, timeout_s: float | None = None) -> bool:
        """Wait until it touches no guest memory; return whether it does not."""


def park_all(runners: Iterable[Runner], timeout_s: float | None = None) -> None:
    """Stop everything that runs; on return none of it is in the guest, or touches its memory.

    A vCPU that waits for a page of memory can be stopped, but for one place: where the processor itself
    looks up the guest's page tables, Linux (6.18) waits for the page and for nothing else.  So it does
    where a device's thread copies to or from guest memory.

    :raises GuestError: one of them has not stopped within the time; all are asked to park still.
    """
    runners = tuple(runners)
    for runner in runners:
        runner.unwant()
    until = None if timeout_s is None else time.monotonic() + timeout_s
    for runner in runners:
        left_s = None if until is None else max(0.0, until - time.monotonic())
        if not runner.wait_parked(left_s):
            raise GuestError(
                f"{runner.name} did not stop within {timeout_s:g} s: it waits for {runner.awaits}"
            )
