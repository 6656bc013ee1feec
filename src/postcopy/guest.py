"""What an engine asks of a guest, whatever the guest is.

A guest is our own small machine, and one day a process with arrays or a foreign monitor.  The
engine never sees more of it than this file says.  The guest lives in its own process; the engine
talks to it through :mod:`postcopy.link`, whose proxy has these same methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Region:
    """One RAM block as its owner sees it.

    ``fd`` is a memfd (or hugetlb memfd) whose bytes ``[fd_offset, fd_offset + size_bytes)`` are the
    block; ``host_address`` is where the guest's process has it mapped, which is what userfaultfd
    speaks of.
    """

    name: str
    size_bytes: int
    page_size_bytes: int
    guest_address: int
    host_address: int
    fd: int
    fd_offset: int = 0


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One device as a FULL section of the stream carries it; ``payload`` is opaque to engines."""

    name: str
    instance: int
    version: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class VcpuThread:
    """Which thread of the guest's process runs a vCPU: faults name threads, users name vCPUs."""

    index: int
    thread_id: int


class Guest(Protocol):
    """A guest that can be moved.  Every method may be called from any thread."""

    @property
    def machine_name(self) -> str:
        """What the configuration section says, such as ``microvm``."""

    def regions(self) -> Sequence[Region]:
        """The RAM blocks, largest first; the same for the guest's whole life."""

    def vcpu_threads(self) -> Sequence[VcpuThread]:
        """The threads that run vCPUs, in order of the vCPUs' numbers."""

    def pause(self) -> None:
        """Stop every vCPU; on return none of them writes to memory.  Harmless when stopped."""

    def resume(self) -> None:
        """Let the vCPUs run.

        :raises GuestError: the guest is not in a state to run.
        """

    def save_devices(self) -> Sequence[DeviceState]:
        """The state of all devices of a stopped guest, ``globalstate`` last."""

    def load_devices(self, states: Sequence[DeviceState]) -> None:
        """Take over the state of the devices; may touch guest memory that is still missing.

        :raises GuestError: a device refuses its state; nothing runs.
        """
