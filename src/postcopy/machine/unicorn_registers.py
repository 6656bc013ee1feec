"""A :class:`CpuState` into a unicorn engine, and back.

An engine's registers can be written one by one, with two exceptions that matter: writing CS and SS
selectors does not change the privilege level, and there is no way to give a segment's hidden part.
So a state is loaded as a kernel would: on a page outside the guest's memory an ``IRETQ`` is executed, which
loads both from a descriptor table made for it.  Paging is switched on behind it.  What an engine does not
have (debug status, machine check, kvmclock...) is kept beside it and returned as it came.
"""

import struct
from dataclasses import replace
from typing import Any, Final

from postcopy.errors import GuestError
from postcopy.machine.cpu_state import (
    GENERAL,
    MSRS,
    NOTHING_PENDING,
    SEGMENTS,
    CpuState,
    DescriptorTable,
    Fpu,
    Segment,
)

_PORCH: Final = 1 << 38
"""Guest physical address of the page that a state enters by: beyond any memory we allow."""

_PORCH_BYTES: Final = 0x20000
_STACK_AT: Final = 0x800
_TABLE_AT: Final = 0x10000
_IRETQ: Final = b"\x48\xcf"
_NOWHERE: Final = (1 << 64) - 1

_EFER: Final = 0xC0000080
_LONG_MODE_ACTIVE: Final = 1 << 10
_LONG_CODE: Final = 1 << 21
_GRANULAR: Final = 1 << 23
_MASK_64: Final = (1 << 64) - 1

_HOST_MSRS: Final = frozenset({0x10, 0x4B564D00, 0x4B564D01})
"""The TSC has a place of its own; unicorn offers no kvmclock."""

_NAMED: Final = {"cr0": "CR0", "cr3": "CR3", "cr4": "CR4", "mxcsr": "MXCSR"}
"""CR2 is not among those read back: starting or stopping the engine writes nonsense to it."""


class UnicornRegisters:
    """The registers of one engine.

    :param constants: the module ``unicorn.x86_const``.
    :param engine: a new ``unicorn.Uc`` in 64-bit mode: privilege 0, no paging.
    """

    def __init__(self, constants: Any, engine: Any) -> None:
        self._constants = constants
        self._engine = engine
        self._base = CpuState()

    @property
    def rip(self) -> int:
        """Where the vCPU stands."""
        return int(self._read("RIP"))

    @property
    def fault_address(self) -> int:
        """CR2; right only inside the hook of a page fault, see ``_NAMED``."""
        return int(self._read("CR2"))

    @property
    def idt_limit(self) -> int:
        """Limit of the interrupt table in bytes; 0 means that no exception has a handler."""
        return int(self._read("IDTR")[2])

    def load(self, state: CpuState) -> None:
        """Take over a state, once in an engine's life."""
        self._enter_mode(state)
        self._write("GDTR", (0, state.gdt.base, state.gdt.limit, 0))
        self._write("IDTR", (0, state.idt.base, state.idt.limit, 0))
        self._write_msrs(state)
        self._write_fpu(state.fpu)
        for number, value in enumerate(state.xmm):
            self._write(f"XMM{number}", value)
        for number, value in enumerate(state.dr):
            self._write(f"DR{number}", value)
        for name, value in zip(GENERAL, state.regs, strict=True):
            self._write(name.upper(), value)
        self._write("MXCSR", state.mxcsr)
        # Paging last, so that nothing above is looked up in the guest's page tables.
        for name in ("cr3", "cr4", "cr0"):
            self._write(_NAMED[name], getattr(state, name))
        self._write("CR2", state.cr2)
        self._write("FS_BASE", state.fs.base)
        self._write("GS_BASE", state.gs.base)
        self._base = state

    def save(self) -> CpuState:
        """The state of an engine that stands still, but for the TSC."""
        base = self._base
        values: dict[str, Any] = {n: self._read(uc) for n, uc in _NAMED.items()}
        values |= {name: self._segment(name) for name in SEGMENTS}
        values |= self._read_msrs()
        _, gdt_base, gdt_limit, _ = self._read("GDTR")
        _, idt_base, idt_limit, _ = self._read("IDTR")
        return replace(
            base,
            regs=tuple(self._read(name.upper()) for name in GENERAL),
            rip=self._read("RIP"),
            rflags=self._read("RFLAGS"),
            efer=self._engine.msr_read(_EFER),
            gdt=DescriptorTable(gdt_base, gdt_limit),
            idt=DescriptorTable(idt_base, idt_limit),
            dr=tuple(self._read(f"DR{number}") for number in range(4)) + base.dr[4:],
            fpu=self._read_fpu(),
            xmm=tuple(self._read(f"XMM{number}") for number in range(16)),
            **values,
        )

    def _read(self, name: str) -> Any:
        return self._engine.reg_read(getattr(self._constants, f"UC_X86_REG_{name}"))

    def _write(self, name: str, value: Any) -> None:
        self._engine.reg_write(getattr(self._constants, f"UC_X86_REG_{name}"), value)

    def _enter_mode(self, state: CpuState) -> None:
        """Load the segments, flags and RIP with the privilege that goes with them."""
        engine = self._engine
        engine.mem_map(_PORCH, _PORCH_BYTES)
        try:
            for name in SEGMENTS:
                segment: Segment = getattr(state, name)
                entry = struct.pack("<Q", _descriptor(segment))
                engine.mem_write(_PORCH + _TABLE_AT + (segment.selector & 0xFFF8), entry)
            self._write("GDTR", (0, _PORCH + _TABLE_AT, 0xFFFF, 0))
            for name, uc in (("ldt", "LDTR"), ("tr", "TR")):
                part: Segment = getattr(state, name)
                self._write(uc, (part.selector, part.base, part.limit, part.flags))
            frame = (state.rip, state.cs.selector, state.rflags, state.reg("rsp"))
            stack = struct.pack("<5Q", *frame, state.ss.selector)
            engine.mem_write(_PORCH + _STACK_AT, stack)
            engine.mem_write(_PORCH, _IRETQ)
            self._write("RSP", _PORCH + _STACK_AT)
            engine.emu_start(_PORCH, _NOWHERE, count=1)
            # Now, since the way down in privilege empties DS and ES.
            for name in ("es", "ds", "fs", "gs"):
                self._write(name.upper(), getattr(state, name).selector)
        finally:
            engine.mem_unmap(_PORCH, _PORCH_BYTES)

    def _write_msrs(self, state: CpuState) -> None:
        for msr in MSRS:
            if msr.index not in _HOST_MSRS:
                value = getattr(state, msr.field)
                value = value if msr.position is None else value[msr.position]
                self._engine.msr_write(msr.index, value)
        self._engine.msr_write(_EFER, state.efer)

    def _read_msrs(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for msr in MSRS:
            if msr.index in _HOST_MSRS:
                continue
            value = self._engine.msr_read(msr.index)
            if msr.position is None:
                values[msr.field] = value
            else:
                values[msr.field] = (*values.get(msr.field, ()), value)
        return values

    def _write_fpu(self, fpu: Fpu) -> None:
        top = fpu.status >> 11 & 7
        for number, value in enumerate(fpu.registers):
            self._write(f"FP{(top + number) & 7}", (value & _MASK_64, value >> 64))
        tags = sum(3 << 2 * number for number in range(8) if not fpu.in_use >> number & 1)
        for name, number in (("FPCW", fpu.control), ("FPSW", fpu.status), ("FPTAG", tags)):
            self._write(name, number)
        for name, number in (("FOP", fpu.last_opcode), ("FIP", fpu.last_ip), ("FDP", fpu.last_dp)):
            self._write(name, number)

    def _read_fpu(self) -> Fpu:
        status, tags = self._read("FPSW"), self._read("FPTAG")
        top = status >> 11 & 7
        physical = [self._read(f"FP{number}") for number in range(8)]
        return Fpu(
            control=self._read("FPCW"),
            status=status,
            in_use=sum(1 << number for number in range(8) if tags >> 2 * number & 3 != 3),
            registers=tuple(
                exponent << 64 | mantissa
                for mantissa, exponent in (physical[(top + n) & 7] for n in range(8))
            ),
            last_opcode=self._read("FOP"),
            last_ip=self._read("FIP"),
            last_dp=self._read("FDP"),
        )

    def _segment(self, name: str) -> Segment:
        """A segment as it was loaded, if the guest has not changed the selector since."""
        loaded: Segment = getattr(self._base, name)
        selector = self._read(name.upper())
        base = self._read(f"{name.upper()}_BASE") if name in {"fs", "gs"} else loaded.base
        if selector == loaded.selector:
            return replace(loaded, base=base)
        # In 64-bit mode only the selector of a data segment can be seen; CS and SS are flat.
        like: Segment = self._base.cs if name == "cs" else self._base.ss
        flags = like.flags & ~(3 << 13) | (selector & 3) << 13
        return Segment(selector, base, like.limit, flags if selector & 0xFFFC else 0)


def refuse_foreign(state: CpuState) -> None:
    """Refuse what software cannot go on from.

    :raises GuestError: what it is, and that KVM can.
    """
    if not (state.efer & _LONG_MODE_ACTIVE and state.cs.flags & _LONG_CODE):
        raise GuestError("the software CPU runs 64-bit code only; run this guest with KVM")
    if any(state.ymm_high) or state.opaque.get("cpu/avx512"):
        raise GuestError("the guest uses AVX, which the software CPU lacks; run it with KVM")
    if state.events.interrupt != NOTHING_PENDING or state.events.nmi_pending:
        raise GuestError("an interrupt is on its way, which needs KVM to arrive")


def _descriptor(segment: Segment) -> int:
    """The eight bytes of a descriptor table that make this segment."""
    limit = segment.limit >> 12 if segment.flags & _GRANULAR else segment.limit
    low = limit & 0xFFFF | (segment.base & 0xFFFF) << 16
    high = segment.base >> 16 & 0xFF | segment.flags & 0xF0FF00
    high |= limit & 0xF0000 | segment.base & 0xFF000000
    return low | high << 32
