"""One vCPU in software: a unicorn engine over the guest's memory.

Some facts about unicorn 2.1 that shape this file:

* ``emu_start`` lets go of the interpreter lock, so a vCPU that waits for a missing page holds up
  no other thread.  But nothing can call it back from there: a kick takes effect when the page has come.
* ``emu_stop`` from another thread stops the engine behind any load or store, *in the middle* of an
  instruction and with RIP at some earlier one, which is then executed twice.  It is never used so.
  Stops are exact after a given count of instructions, and from a hook at the start of a block.
* After a count it is not known whether it was reached or the guest has executed HLT.  User code,
  where HLT is a fault, is run in slices of a count (half the full speed); code that may halt is run
  with a hook on each block (a tenth of it).
* Exceptions are handed to a hook and never to the guest's handlers.  A guest without an IDT ends
  with a triple fault, as on hardware; one with an IDT cannot go on here.
* RDTSC cannot be intercepted: the guest sees the host's time stamp counter.
"""

import gc
import importlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from postcopy.errors import GuestError, HostCannot
from postcopy.kernel.mapping import Mapping
from postcopy.machine.address_map import AddressMap
from postcopy.machine.cpu import Exit, ExitReason, MmioWindow, Ports
from postcopy.machine.cpu_state import CpuState
from postcopy.machine.unicorn_registers import UnicornRegisters, refuse_foreign

_NOWHERE: Final = (1 << 64) - 1  # "run until this address": never reached
_SLICE: Final = 100_000  # instructions: 1-2 ms, the time that a kick may take
_INTERRUPTED: Final = Exit(ExitReason.INTERRUPTED)
_PAGE_FAULT: Final = 14
_ENGINES_KEPT: Final = 64  # of some 80 KiB each
_RDTSC: Final = b"\x0f\x31"


def load_unicorn() -> tuple[Any, Any]:
    """The modules ``unicorn`` and ``unicorn.x86_const``.

    :raises HostCannot: they are not installed.
    """
    try:
        return importlib.import_module("unicorn"), importlib.import_module("unicorn.x86_const")
    except ImportError as error:
        raise HostCannot(
            "the software CPU is not installed", "pip install 'postcopy[unicorn]'"
        ) from error


@dataclass(frozen=True, slots=True)
class MappedMemory:
    """RAM of the guest at a physical address, and where it is here; whole pages of 4096 bytes."""

    guest_address: int
    host_address: int
    size_bytes: int


class UnicornCpu:
    """:class:`postcopy.machine.cpu.Cpu` in software.

    :param ports: what IN and OUT reach; called on the vCPU's thread.
    :param memory: all of the guest's RAM.
    :param window: what it finds beside RAM.
    :raises HostCannot: unicorn is not installed.
    """

    def __init__(
        self,
        ports: Ports,
        memory: Sequence[MappedMemory],
        window: MmioWindow | None = None,
    ) -> None:
        self._unicorn, self._constants = load_unicorn()
        self._ports = ports
        self._memory = memory
        self._window = window
        self._kicked = threading.Event()
        self._exception: int | None = None
        self._fault_address = 0
        self._stopped = False
        self._may_halt = False
        self._engine: Any = None
        self._registers: UnicornRegisters | None = None
        self._engines = 0

    def enter(self) -> Exit:
        """See :meth:`postcopy.machine.cpu.Cpu.enter`.  INs and OUTs are served on the way."""
        registers = self._loaded()
        self._exception, self._stopped = None, False
        try:
            while not self._kicked.is_set():
                count = 0 if self._may_halt else _SLICE
                self._engine.emu_start(registers.rip, _NOWHERE, count=count)
                if self._exception is not None:
                    return self._fault(f"exception {self._exception}")
                if self._may_halt and not self._stopped:
                    return Exit(ExitReason.HALTED)
        except self._unicorn.UcError as error:
            return self._failure(error)
        return _INTERRUPTED

    def kick(self) -> None:
        """See :meth:`postcopy.machine.cpu.Cpu.kick`; looked at between slices or blocks."""
        self._kicked.set()

    def unkick(self) -> None:
        """See :meth:`postcopy.machine.cpu.Cpu.unkick`."""
        self._kicked.clear()

    def get_state(self) -> CpuState:
        """See :meth:`postcopy.machine.cpu.Cpu.get_state`.

        Before the first :meth:`set_state` it is a processor's reset state.
        """
        if self._registers is None:
            return CpuState()
        return replace(self._registers.save(), tsc=self._host_tsc())

    def set_state(self, state: CpuState) -> None:
        """See :meth:`postcopy.machine.cpu.Cpu.set_state`.

        ``tsc`` is not taken: between accelerators of one host it is the same counter anyway.
        """
        refuse_foreign(state)
        # A new engine: the one way back to privilege 0, from where a state can be loaded.
        engine = self._unicorn.Uc(self._unicorn.UC_ARCH_X86, self._unicorn.UC_MODE_64)
        every = self._unicorn.UC_PROT_ALL
        for part in self._memory:
            engine.mem_map_ptr(part.guest_address, part.size_bytes, every, part.host_address)
        window = self._window
        if window is not None:
            callbacks = self._on_window_read, None, self._on_window_write, None
            engine.mmio_map(window.address, window.size_bytes, *callbacks)
        registers = UnicornRegisters(self._constants, engine)
        registers.load(state)
        # Privilege 0 can only be reached from user code by SYSCALL or through an IDT.
        self._may_halt = bool(state.privilege != 3 or state.lstar or state.idt.limit)
        self._install_hooks(engine)
        self._engine, self._registers = engine, registers
        # An engine with hooks is a cycle of references, and large: a guest that is taken back again and
        # again must not wait for the collector to find that out.
        self._engines += 1
        if self._engines % _ENGINES_KEPT == 0:
            gc.collect()

    def close(self) -> None:
        """The vCPU's thread must have ended; the guest's memory stays."""
        self._engine = self._registers = None

    def _loaded(self) -> UnicornRegisters:
        if self._registers is None:
            raise GuestError("the software CPU has no state to run from; give it a 64-bit one")
        return self._registers

    def _install_hooks(self, engine: Any) -> None:
        unicorn, constants = self._unicorn, self._constants
        engine.hook_add(unicorn.UC_HOOK_INTR, self._on_exception)
        engine.hook_add(unicorn.UC_HOOK_INSN, self._on_in, None, 1, 0, constants.UC_X86_INS_IN)
        engine.hook_add(unicorn.UC_HOOK_INSN, self._on_out, None, 1, 0, constants.UC_X86_INS_OUT)
        if self._may_halt:
            engine.hook_add(unicorn.UC_HOOK_BLOCK, self._on_block)

    def _on_exception(self, engine: Any, number: int, _data: object) -> None:
        self._exception = number
        self._fault_address = self._loaded().fault_address
        engine.emu_stop()

    def _on_block(self, engine: Any, _address: int, _size: int, _data: object) -> None:
        if self._kicked.is_set():
            self._stopped = True
            engine.emu_stop()

    def _on_in(self, _engine: object, port: int, size_bytes: int, _data: object) -> int:
        return self._ports.read(port, size_bytes)

    def _on_out(
        self, _engine: object, port: int, size_bytes: int, value: int, _data: object
    ) -> None:
        self._ports.write(port, size_bytes, value & (1 << 8 * size_bytes) - 1)

    def _on_window_read(self, _engine: object, offset: int, size_bytes: int, _data: object) -> int:
        assert self._window is not None
        return self._window.read(offset, size_bytes)

    def _on_window_write(
        self, _engine: object, offset: int, size_bytes: int, value: int, _data: object
    ) -> None:
        assert self._window is not None
        self._window.write(offset, size_bytes, value & (1 << 8 * size_bytes) - 1)

    def _failure(self, error: Any) -> Exit:
        if error.errno == self._unicorn.UC_ERR_INSN_INVALID:
            return self._fault("an unknown instruction")
        return Exit(ExitReason.FAILED, f"{error} at {self._where()}")

    def _fault(self, what: str) -> Exit:
        """An exception: the end, for a guest that has no handlers."""
        detail = f"{what} at {self._where()}"
        if self._loaded().idt_limit:
            detail += ", whose handler the software CPU cannot call; run this guest with KVM"
            return Exit(ExitReason.FAILED, detail)
        return Exit(ExitReason.SHUTDOWN, detail)

    def _where(self) -> str:
        where = f"RIP {self._loaded().rip:#x}"
        if self._exception == _PAGE_FAULT:
            where += f", touching address {self._fault_address:#x}"
        return where

    def _host_tsc(self) -> int:
        """The host's time stamp counter, for which Python has no instruction: a tiny guest has."""
        probe = self._unicorn.Uc(self._unicorn.UC_ARCH_X86, self._unicorn.UC_MODE_64)
        probe.mem_map(0, 4096)
        probe.mem_write(0, _RDTSC)
        probe.emu_start(0, len(_RDTSC))
        high = probe.reg_read(self._constants.UC_X86_REG_RDX)
        return int(high << 32 | probe.reg_read(self._constants.UC_X86_REG_RAX))


class UnicornAccelerator:
    """Makes a software vCPU with an engine of its own for each number; they share the memory.

    Locked instructions are atomic within one vCPU only: guests that share locks between vCPUs need
    KVM.

    :param addresses: where the memory stands among the guest's physical addresses.
    :raises HostCannot: unicorn is not installed.
    """

    name = "unicorn"

    def __init__(self, ram: Mapping, addresses: AddressMap) -> None:
        load_unicorn()
        self._memory = [
            MappedMemory(part.guest_address, ram.address + part.offset, part.size_bytes)
            for part in addresses.parts
        ]

    def create_cpu(
        self,
        index: int,  # noqa: ARG002 - all are alike
        ports: Ports,
        window: MmioWindow | None = None,
    ) -> UnicornCpu:
        """A vCPU in its reset state; give it a 64-bit one before it is entered."""
        return UnicornCpu(ports, self._memory, window)

    def signal_at_write(self, guest_address: int, value: int, fd: int) -> None:
        """Each write comes to the window."""

    def start_dirty_log(self) -> None:
        """There is none: the memory is written by ordinary stores of this process.

        :raises HostCannot: always.
        """
        raise HostCannot("the software CPU keeps no dirty log", "track dirty pages by pagemap")

    def stop_dirty_log(self) -> None:
        """Nothing was started."""

    def fetch_dirty_log(self, start: int, end: int) -> npt.NDArray[np.uint8]:  # noqa: ARG002
        """See :meth:`start_dirty_log`.

        :raises HostCannot: always.
        """
        raise HostCannot("the software CPU keeps no dirty log", "track dirty pages by pagemap")

    def close(self) -> None:
        """The vCPUs hold everything there is."""
