"""vCPUs run by the host's hardware."""

import signal
import threading
from typing import TYPE_CHECKING

from postcopy.abi import kvm as abi
from postcopy.errors import GuestError, HostCannot, KernelError
from postcopy.kernel.kvm import Kvm, KvmVcpu
from postcopy.kernel.mapping import Mapping
from postcopy.machine import cpuid
from postcopy.machine.address_map import AddressMap
from postcopy.machine.cpu import Exit, ExitReason, MmioWindow, Ports
from postcopy.machine.cpu_state import CpuState
from postcopy.machine.kvm_state import read_kvm_state, with_lost_iopl, write_kvm_state
from postcopy.machine.vcpu import KICK

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_PAGE_BYTES = 4096
_MOST_ACCESSES = 16  # of 8 bytes each, of one instruction

_INTERRUPTED = Exit(ExitReason.INTERRUPTED)
_SERVED = Exit(ExitReason.SERVED)
_HALTED = Exit(ExitReason.HALTED)
_SHUTDOWN = Exit(ExitReason.SHUTDOWN, "triple fault")


class KvmAccelerator:
    """One KVM machine, with a slot for each part of its memory.

    :param addresses: where the memory stands among the guest's physical addresses.
    :raises HostCannot: there is no usable KVM, or its physical addresses are too short.
    """

    name = "kvm"

    def __init__(self, ram: Mapping, addresses: AddressMap) -> None:
        self._ram = ram
        self._parts = addresses.parts
        with Kvm() as kvm:
            self._cpuid = kvm.supported_cpuid()
            self._check_reach(addresses.end_address)
            self._vm = kvm.create_vm()
        self._set_memory(log_dirty=False)

    def create_cpu(self, index: int, ports: Ports, window: MmioWindow | None = None) -> "KvmCpu":
        """The vCPU of that number; its CPUID offers what :mod:`~postcopy.machine.cpuid` leaves."""
        vcpu = self._vm.create_vcpu(index)
        vcpu.set_cpuid(cpuid.carried(self._cpuid, index))
        return KvmCpu(vcpu, self._ram, ports, cpuid.physical_address_bits(self._cpuid), window)

    def signal_at_write(self, guest_address: int, value: int, fd: int) -> None:
        """See :meth:`postcopy.kernel.kvm.KvmVm.signal_at_write`."""
        self._vm.signal_at_write(guest_address, value, fd)

    def start_dirty_log(self) -> None:
        """KVM begins with nothing dirty."""
        self._set_memory(log_dirty=True)

    def stop_dirty_log(self) -> None:
        """KVM forgets what it has noted."""
        self._set_memory(log_dirty=False)

    def fetch_dirty_log(self, start: int, end: int) -> "npt.NDArray[np.uint8]":
        """See :meth:`postcopy.kernel.kvm.KvmVm.dirty_log`; of whole blocks, in order of offsets."""
        import numpy as np

        # Parts are whole units of 2 MiB, which is whole words of the log.
        return np.concatenate(
            [
                self._vm.dirty_log(slot, part.size_bytes)
                for slot, part in enumerate(self._parts)
                if start <= part.offset < end
            ]
        )

    def close(self) -> None:
        """The kernel frees the machine when its vCPUs are closed too."""
        self._vm.close()

    def _set_memory(self, *, log_dirty: bool) -> None:
        for slot, part in enumerate(self._parts):
            address, here = part.guest_address, self._ram.address + part.offset
            self._vm.set_memory(slot, address, part.size_bytes, here, log_dirty=log_dirty)

    def _check_reach(self, end_address: int) -> None:
        bits = cpuid.physical_address_bits(self._cpuid)
        if end_address > 1 << bits:
            raise HostCannot(
                f"this host's KVM has physical addresses of {bits} bits, too few for the memory",
                f"give the guest less than {1 << bits - 20} MiB",
            )


class KvmCpu:
    """One vCPU: :class:`postcopy.machine.cpu.Cpu` over ``KVM_RUN``.

    :param address_bits: of a guest physical address, as its CPUID says.
    :param window: what the guest finds beside RAM.
    """

    def __init__(
        self,
        vcpu: KvmVcpu,
        ram: Mapping,
        ports: Ports,
        address_bits: int,
        window: MmioWindow | None = None,
    ) -> None:
        self._vcpu = vcpu
        self._ram = ram
        self._ports = ports
        self._window = window
        self._address_bits = address_bits
        self._thread: int | None = None
        self._loaded: CpuState | None = None

    def enter(self) -> Exit:
        """See :meth:`postcopy.machine.cpu.Cpu.enter`."""
        if self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            # SIGBUS, which a poisoned page gives, ends KVM_RUN and waits to be looked at.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})
            self._vcpu.block_signals_inside(blocked - {signal.SIGBUS})
        try:
            reason = self._vcpu.enter()
        except KernelError as error:
            return Exit(ExitReason.FAILED, str(error))
        if reason is abi.Exit.INTR:
            return self._at_a_lost_page() or _INTERRUPTED
        if reason is abi.Exit.IO:
            self._serve_port()
            return _SERVED
        if reason is abi.Exit.MMIO and self._serve_window():
            return _SERVED
        return self._end(reason)

    def _end(self, reason: abi.Exit) -> Exit:
        if reason is abi.Exit.HLT:
            return _HALTED
        if reason is abi.Exit.SHUTDOWN:
            return _SHUTDOWN
        failed = Exit(ExitReason.FAILED, self._describe(reason))
        if reason is abi.Exit.MMIO:
            self._finish_access()
        return failed

    def kick(self) -> None:
        """First the flag, then the signal: whichever side of the entry it meets, it works."""
        self._vcpu.ask_exit()
        if self._thread is not None:
            signal.pthread_kill(self._thread, KICK)

    def unkick(self) -> None:
        """See :meth:`postcopy.machine.cpu.Cpu.unkick`."""
        self._vcpu.allow_entry()

    def get_state(self) -> CpuState:
        """See :meth:`postcopy.machine.cpu.Cpu.get_state`."""
        return with_lost_iopl(read_kvm_state(self._vcpu), self._loaded)

    def set_state(self, state: CpuState) -> None:
        """See :meth:`postcopy.machine.cpu.Cpu.set_state`."""
        try:
            write_kvm_state(self._vcpu, state, self._address_bits)
        except KernelError as error:
            raise GuestError(f"this host's KVM does not take the vCPU's state: {error}") from error
        self._loaded = state

    def close(self) -> None:
        """The vCPU's thread must have ended."""
        self._vcpu.close()

    def _at_a_lost_page(self) -> Exit | None:
        found = signal.sigtimedwait({signal.SIGBUS}, 0)
        if found is None:
            return None
        # The union of siginfo_t has the address where a signal of a process has its sender.
        address = (found.si_uid & 0xFFFFFFFF) << 32 | (found.si_pid & 0xFFFFFFFF)
        where = (address - self._ram.address) & -_PAGE_BYTES
        if not 0 <= where < self._ram.length:
            return Exit(ExitReason.FAILED, f"SIGBUS at {address:#x}, which is no guest memory")
        return Exit(ExitReason.FAILED, f"the page at {where:#x} is lost (poisoned)")

    def _finish_access(self) -> None:
        """Have KVM end the instruction that has ended the guest, whatever it reads.

        Otherwise KVM ends it at the next entry, and a guest that has been taken back to an earlier
        state by then goes on behind an instruction that it has not come to.
        """
        self._vcpu.ask_exit()
        for _ in range(_MOST_ACCESSES):
            if self._vcpu.enter() is not abi.Exit.MMIO:
                break

    def _serve_port(self) -> None:
        access = self._vcpu.run.io
        data = self._vcpu.port_data()
        port, size = access.port, access.size
        outward = access.direction == abi.KVM_EXIT_IO_OUT
        for at in range(0, len(data), size):
            if outward:
                value = int.from_bytes(data[at : at + size], "little")
                self._ports.write(port, size, value)
            else:
                data[at : at + size] = self._ports.read(port, size).to_bytes(size, "little")

    def _serve_window(self) -> bool:
        """Hand an access to the window; return whether it is one."""
        access, window = self._vcpu.run.mmio, self._window
        if window is None:
            return False
        offset = access.phys_addr - window.address
        if not 0 <= offset < window.size_bytes:
            return False
        data = self._vcpu.access_data()
        if access.is_write:
            window.write(offset, len(data), int.from_bytes(data, "little"))
        else:
            value = window.read(offset, len(data)) & (1 << 8 * len(data)) - 1
            data[:] = value.to_bytes(len(data), "little")
        return True

    def _describe(self, reason: abi.Exit) -> str:
        run = self._vcpu.run
        if reason is abi.Exit.FAIL_ENTRY:
            why = f"hardware reason {run.fail_entry.hardware_entry_failure_reason:#x}"
            return f"the processor refuses the vCPU's state: {why}"
        if reason is abi.Exit.MMIO:
            return f"access to address {run.mmio.phys_addr:#x}, where nothing is"
        if reason is abi.Exit.INTERNAL_ERROR:
            return f"KVM could not go on: internal error {run.internal.suberror}"
        return f"KVM gave up with KVM_EXIT_{reason.name}"
