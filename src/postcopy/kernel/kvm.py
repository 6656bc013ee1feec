"""KVM: the host's virtualisation hardware, as three objects, one a descriptor.

:class:`Kvm` is ``/dev/kvm``, :class:`KvmVm` a virtual machine (a guest's physical address space),
:class:`KvmVcpu` a virtual processor.  Source: ``Documentation/virt/kvm/api.rst``.

Two facts matter wherever a vCPU is stopped:

* ``KVM_RUN`` comes back when a signal arrives, but a signal just *before* the call is lost.  So a
  kick first sets ``immediate_exit`` in the shared page and then sends the signal.
* An IN or OUT that ``KVM_RUN`` reported is finished by the *next* ``KVM_RUN``.  Only after an exit
  by ``immediate_exit`` is the state whole and may be read.

There is no in-kernel interrupt controller here: without one, a missing page is reported by
userfaultfd under the vCPU's own thread id (with one, asynchronous page faults may hand it to a
kernel worker, and it is not known which vCPU waits).
"""

import ctypes
import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from postcopy.abi import kvm as abi
from postcopy.abi.ioctl import Ioctl
from postcopy.errors import HostCannot, KernelError
from postcopy.kernel import calls

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_PROT_READ_WRITE = 3
_MAP_SHARED = 1
_MOST_CPUID_ENTRIES = 256
_MOST_MSRS = 1024
_PAGE_BYTES = 4096
_SIGNAL_SET_BYTES = 8  # the kernel's, not the C library's

Structure = TypeVar("Structure", bound=ctypes.Structure)


class _Cpuid(abi.kvm_cpuid2):
    _fields_: ClassVar = [("entries", abi.kvm_cpuid_entry2 * _MOST_CPUID_ENTRIES)]


class _Msrs(abi.kvm_msrs):
    _fields_: ClassVar = [("entries", abi.kvm_msr_entry * _MOST_MSRS)]


class _SignalMask(abi.kvm_signal_mask):
    _fields_: ClassVar = [("signals", ctypes.c_uint8 * _SIGNAL_SET_BYTES)]


class Kvm:
    """``/dev/kvm``."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open it.

        :raises HostCannot: there is none, it may not be opened, or its API version is not 12.
        """
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError as error:
            raise HostCannot(
                f"{path} may not be opened", "run as root or join group kvm"
            ) from error
        except OSError as error:
            cure = "load kvm_intel or kvm_amd (switched on in the firmware), or take unicorn"
            raise HostCannot(f"{path} cannot be opened ({error.strerror})", cure) from error
        version = calls.ioctl_plain(self._fd, abi.KVM_GET_API_VERSION)
        if version != abi.KVM_API_VERSION or not self.has(abi.KVM_CAP_IMMEDIATE_EXIT):
            self.close()
            raise HostCannot(
                "this KVM is too old to stop a vCPU safely", "take Linux 4.13 or newer"
            )

    def has(self, capability: int) -> int:
        """What ``KVM_CHECK_EXTENSION`` says about ``KVM_CAP_*``: 0 is no."""
        return calls.ioctl_plain(self._fd, abi.KVM_CHECK_EXTENSION, capability)

    def supported_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """Every CPUID leaf that this host can offer to a guest."""
        answer = _Cpuid(nent=_MOST_CPUID_ENTRIES)
        calls.ioctl(self._fd, abi.KVM_GET_SUPPORTED_CPUID, answer)
        return list(answer.entries[: answer.nent])

    def create_vm(self) -> "KvmVm":
        """A new guest: no memory, no vCPU, no interrupt controller."""
        run_bytes = calls.ioctl_plain(self._fd, abi.KVM_GET_VCPU_MMAP_SIZE)
        return KvmVm(calls.ioctl_plain(self._fd, abi.KVM_CREATE_VM), run_bytes)

    def close(self) -> None:
        """Close the device; machines made from it go on."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class KvmVm:
    """One guest's physical address space, and where its vCPUs come from."""

    def __init__(self, fd: int, run_bytes: int) -> None:
        self._fd = fd
        self._run_bytes = run_bytes

    def set_memory(
        self, slot: int, guest_address: int, size_bytes: int, host_address: int, *, log_dirty: bool
    ) -> None:
        """Put the host's memory at a guest address, or switch a slot's dirty log on or off.

        Allowed while vCPUs run.  Switching the log on starts with nothing dirty.
        """
        flags = abi.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0
        region = abi.kvm_userspace_memory_region(
            slot, flags, guest_address, size_bytes, host_address
        )
        calls.ioctl(self._fd, abi.KVM_SET_USER_MEMORY_REGION, region)

    def dirty_log(self, slot: int, size_bytes: int) -> "npt.NDArray[np.uint8]":
        """Fetch and clear what vCPUs have written in a slot since the last call.

        :return: one bit for each 4 KiB page, page 0 in the lowest bit of byte 0.
        :raises KernelError: ``ENOENT`` when the slot's log is off.
        """
        import numpy as np

        # KVM writes whole 64-bit words.
        words = -(-size_bytes // (_PAGE_BYTES * 64))
        bitmap = np.zeros(words * 8, dtype=np.uint8)
        calls.ioctl(self._fd, abi.KVM_GET_DIRTY_LOG, abi.kvm_dirty_log(slot, 0, bitmap.ctypes.data))
        return bitmap[: -(-size_bytes // (_PAGE_BYTES * 8))]

    def signal_at_write(self, guest_address: int, value: int, fd: int) -> None:
        """Have the guest's write of a 32-bit value at an address signal an eventfd, with no exit.

        :raises KernelError: ``EEXIST`` when another descriptor has the same address and value.
        """
        flags = abi.KVM_IOEVENTFD_FLAG_DATAMATCH
        calls.ioctl(
            self._fd, abi.KVM_IOEVENTFD, abi.kvm_ioeventfd(value, guest_address, 4, fd, flags)
        )

    def create_vcpu(self, index: int) -> "KvmVcpu":
        """A new vCPU in its reset state; set its CPUID before anything else."""
        return KvmVcpu(calls.ioctl_plain(self._fd, abi.KVM_CREATE_VCPU, index), self._run_bytes)

    def close(self) -> None:
        """Close the machine; the kernel frees it when its vCPUs are closed too."""
        os.close(self._fd)


class KvmVcpu:
    """One virtual processor.

    ``enter`` and the state belong to one thread at a time; ``ask_exit`` may come from any.
    """

    def __init__(self, fd: int, run_bytes: int) -> None:
        self._fd = fd
        self._run_bytes = run_bytes
        self._run_address = calls.mmap(run_bytes, _PROT_READ_WRITE, _MAP_SHARED, fd)
        self.run = abi.kvm_run.from_address(self._run_address)

    def enter(self) -> abi.Exit:
        """``KVM_RUN``, without the interpreter lock: run the guest until it exits.

        :return: ``Exit.INTR`` for a signal or :meth:`ask_exit`; details of the others stand in
            ``run`` until the next entry.
        :raises KernelError: the vCPU cannot run (``EFAULT``: its memory is not there).
        """
        try:
            calls.ioctl_plain(self._fd, abi.KVM_RUN, retry=False)
        except KernelError as error:
            if error.errno == errno.EINTR:
                return abi.Exit.INTR
            raise
        try:
            return abi.Exit(self.run.exit_reason)
        except ValueError:
            return abi.Exit.UNKNOWN

    def ask_exit(self) -> None:
        """Make every entry end at once, until :meth:`allow_entry`; a running one needs a signal."""
        self.run.immediate_exit = 1

    def allow_entry(self) -> None:
        """Take :meth:`ask_exit` back."""
        self.run.immediate_exit = 0

    def block_signals_inside(self, numbers: Iterable[int]) -> None:
        """Set which signals are blocked while in the guest, whatever is blocked outside.

        A signal that is blocked outside alone ends :meth:`enter` and stays pending.
        """
        blocked = sum(1 << (number - 1) for number in set(numbers))
        argument = _SignalMask(len=_SIGNAL_SET_BYTES)
        argument.signals[:] = blocked.to_bytes(_SIGNAL_SET_BYTES, "little")
        calls.ioctl(self._fd, abi.KVM_SET_SIGNAL_MASK, argument)

    def port_data(self) -> memoryview:
        """After ``Exit.IO``: the bytes that OUT gave, or room for what IN is to find.

        ``run.io.size`` bytes an access, ``run.io.count`` accesses one behind the other.
        """
        access = self.run.io
        buffer = ctypes.c_uint8 * (access.size * access.count)
        return memoryview(buffer.from_address(self._run_address + access.data_offset)).cast("B")

    def access_data(self) -> memoryview:
        """After ``Exit.MMIO``: the bytes that the guest wrote, or room for what it is to read."""
        access = self.run.mmio
        return memoryview(access.data).cast("B")[: access.len]

    def set_cpuid(self, entries: Sequence[abi.kvm_cpuid_entry2]) -> None:
        """What CPUID shall answer; before the first entry."""
        argument = _Cpuid(nent=len(entries))
        argument.entries[: len(entries)] = list(entries)
        calls.ioctl(self._fd, abi.KVM_SET_CPUID2, argument)

    @property
    def tsc_khz(self) -> int:
        """The rate of the guest's time stamp counter; 0 if the host does not know it."""
        try:
            return calls.ioctl_plain(self._fd, abi.KVM_GET_TSC_KHZ)
        except KernelError:
            return 0

    def set_tsc_khz(self, khz: int) -> None:
        """Have the guest's time stamp counter run at this rate; before its value is set.

        :raises KernelError: the host's processor cannot scale it so.
        """
        calls.ioctl_plain(self._fd, abi.KVM_SET_TSC_KHZ, khz)

    def get_regs(self) -> abi.kvm_regs:
        """The general registers."""
        return self._get(abi.KVM_GET_REGS, abi.kvm_regs())

    def set_regs(self, regs: abi.kvm_regs) -> None:
        """See :meth:`get_regs`."""
        calls.ioctl(self._fd, abi.KVM_SET_REGS, regs)

    def get_sregs(self) -> abi.kvm_sregs:
        """Segments, descriptor tables and control registers."""
        return self._get(abi.KVM_GET_SREGS, abi.kvm_sregs())

    def set_sregs(self, sregs: abi.kvm_sregs) -> None:
        """Before MSRs and general registers: what they may hold depends on the mode."""
        calls.ioctl(self._fd, abi.KVM_SET_SREGS, sregs)

    def get_xsave(self) -> abi.kvm_xsave:
        """The x87, SSE and AVX state, as XSAVE writes it."""
        return self._get(abi.KVM_GET_XSAVE, abi.kvm_xsave())

    def set_xsave(self, xsave: abi.kvm_xsave) -> None:
        """After :meth:`set_xcrs`, which says what of it exists."""
        calls.ioctl(self._fd, abi.KVM_SET_XSAVE, xsave)

    def get_xcrs(self) -> abi.kvm_xcrs:
        """XCR0."""
        return self._get(abi.KVM_GET_XCRS, abi.kvm_xcrs())

    def set_xcrs(self, xcrs: abi.kvm_xcrs) -> None:
        """See :meth:`get_xcrs`."""
        calls.ioctl(self._fd, abi.KVM_SET_XCRS, xcrs)

    def get_debugregs(self) -> abi.kvm_debugregs:
        """DR0-DR3, DR6, DR7."""
        return self._get(abi.KVM_GET_DEBUGREGS, abi.kvm_debugregs())

    def set_debugregs(self, debugregs: abi.kvm_debugregs) -> None:
        """See :meth:`get_debugregs`."""
        calls.ioctl(self._fd, abi.KVM_SET_DEBUGREGS, debugregs)

    def get_mp_state(self) -> abi.kvm_mp_state:
        """Whether the vCPU is runnable or halted."""
        return self._get(abi.KVM_GET_MP_STATE, abi.kvm_mp_state())

    def set_mp_state(self, mp_state: abi.kvm_mp_state) -> None:
        """Without an interrupt controller in the kernel only *runnable* is allowed."""
        calls.ioctl(self._fd, abi.KVM_SET_MP_STATE, mp_state)

    def get_vcpu_events(self) -> abi.kvm_vcpu_events:
        """Exceptions and interrupts on their way."""
        return self._get(abi.KVM_GET_VCPU_EVENTS, abi.kvm_vcpu_events())

    def set_vcpu_events(self, events: abi.kvm_vcpu_events) -> None:
        """See :meth:`get_vcpu_events`; last of all."""
        calls.ioctl(self._fd, abi.KVM_SET_VCPU_EVENTS, events)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Read model specific registers; those that this host refuses are left out."""
        wanted = list(indices)
        found: dict[int, int] = {}
        while wanted:
            # The kernel stops at the first index it refuses, and says how many it did.
            argument = _msrs(dict.fromkeys(wanted, 0))
            done = calls.ioctl(self._fd, abi.KVM_GET_MSRS, argument)
            found.update((entry.index, entry.data) for entry in argument.entries[:done])
            del wanted[: done + 1]
        return found

    def set_msrs(self, values: Mapping[int, int]) -> tuple[int, ...]:
        """Write model specific registers, in the order given.

        :return: the indices that this host refuses (unknown ones, or values it does not take).
        """
        left = list(values.items())
        refused: list[int] = []
        while left:
            done = calls.ioctl(self._fd, abi.KVM_SET_MSRS, _msrs(dict(left)))
            refused += [index for index, _ in left[done : done + 1]]
            del left[: done + 1]
        return tuple(refused)

    def close(self) -> None:
        """Give the vCPU back; its thread must have left :meth:`enter`."""
        calls.munmap(self._run_address, self._run_bytes)
        os.close(self._fd)

    def _get(self, request: Ioctl[Structure], into: Structure) -> Structure:
        calls.ioctl(self._fd, request, into)
        return into


def _msrs(values: Mapping[int, int]) -> _Msrs:
    argument = _Msrs(nmsrs=len(values))
    for entry, (index, data) in zip(argument.entries, values.items(), strict=False):
        entry.index, entry.data = index, data
    return argument
