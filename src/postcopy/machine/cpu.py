"""What an accelerator gives the machine: one virtual CPU that runs until something happens.

Two of them exist: :class:`~postcopy.machine.kvm_cpu.KvmCpu` (hardware) and, where there is no KVM,
``UnicornCpu`` (software).  Both start from the same :class:`~postcopy.machine.cpu_state.CpuState`
and give their state back as one, so a guest may move from either to the other.
"""

import enum
from dataclasses import dataclass
from typing import Protocol

from postcopy.machine.cpu_state import CpuState


class ExitReason(enum.Enum):
    """Why a vCPU came back from the guest."""

    INTERRUPTED = "interrupted"  # by kick(); also by any signal: enter again unless told to stop
    SERVED = "served"  # an access to a device has been handed to it: enter again
    HALTED = "halted"  # HLT; there are no interrupts, so it stays halted
    SHUTDOWN = "shutdown"  # a triple fault: the guest has ended
    FAILED = "failed"  # the accelerator cannot go on; ``detail`` says what it said


@dataclass(frozen=True, slots=True)
class Exit:
    """One return from the guest; ``detail`` is for a person to read."""

    reason: ExitReason
    detail: str = ""


class Ports(Protocol):
    """What the guest's IN and OUT reach.  Called on the vCPU's thread, in the middle of enter()."""

    def read(self, port: int, size_bytes: int) -> int:
        """What IN reads from the port; all ones where no device is."""

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """What OUT writes to the port; without effect where no device is."""


class MmioWindow(Protocol):
    """Guest addresses where a device's registers are.  Called as :class:`Ports` is.

    :ivar address: of the first byte, a multiple of 4096; ``size_bytes``: of all, too.
    """

    address: int
    size_bytes: int

    def read(self, offset: int, size_bytes: int) -> int:
        """What the guest finds there; zeros where nothing is."""

    def write(self, offset: int, size_bytes: int, value: int) -> None:
        """What the guest's write does."""


class Cpu(Protocol):
    """One virtual CPU.

    All but :meth:`kick` belong to the vCPU's own thread, or to a thread that has seen it parked.
    """

    def enter(self) -> Exit:
        """Run the guest until it exits or is kicked, and say why it stopped.

        Whatever the guest did is complete when this returns ``INTERRUPTED``, and only then is
        :meth:`get_state` whole: after ``SERVED`` an IN may still lack its answer.
        """

    def kick(self) -> None:
        """Make the present or the next enter() return ``INTERRUPTED`` soon; from any thread.

        Holds until :meth:`unkick`, so a kick that comes just before the entry is not lost.  Forbidden
        once the thread that entered has ended, or may end: it would get a signal.
        """

    def unkick(self) -> None:
        """Let enter() run the guest again."""

    def get_state(self) -> CpuState:
        """The architectural state of a vCPU that stands still."""

    def set_state(self, state: CpuState) -> None:
        """Take over a state.

        :raises GuestError: this CPU cannot have it (say which register and why).
        """

    def close(self) -> None:
        """Give everything back to the host; the vCPU never runs again."""
