"""What one x86-64 vCPU is between two instructions, whichever accelerator ran it.

Every accelerator fills a :class:`CpuState` and can be loaded from one; ``cpu_section`` turns it
into the section that QEMU calls ``cpu``.  The values are the architecture's (Intel SDM volume 3,
AMD APM volume 2), the orders are QEMU's.  The defaults are those of a processor after reset,
except that ``mp_state`` is *runnable*.

What KVM knows and QEMU's section has no room for:

``cr8``
    the task priority.  QEMU keeps it in the APIC's section.  Our machine has no APIC, so it holds
    back no interrupt; it goes from KVM to KVM in one process and is zero after a journey.
``apic_base``
    likewise; the accelerator's own reset value stays in force at the destination.
interrupt shadow, SMM and triple fault flags (``KVM_GET_VCPU_EVENTS``)
    the shadow lasts for one instruction and only delays interrupts, of which there are none;
    there is no SMM without firmware.
machine check registers (the other way round: QEMU has them, we do without)
    ``mcg_*`` and ``mce_banks`` are carried from stream to stream and never read from or written to
    KVM, whose number of banks QEMU's section could not hold.
all other MSRs of ``KVM_GET_MSR_INDEX_LIST``
    describe the host (capabilities, microcode) or features that only a kernel with interrupts uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
"""Names of ``CpuState.regs`` in QEMU's order, which is the instruction encoding's."""

SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
"""Names of the segment registers in the instruction encoding's order, QEMU's too."""

MP_RUNNABLE, MP_UNINITIALIZED, MP_INIT_RECEIVED, MP_HALTED, MP_SIPI_RECEIVED = range(5)
"""``KVM_MP_STATE_*`` of ``linux/kvm.h``; QEMU sends the same numbers."""

NOTHING_PENDING = -1


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment register with its hidden part.

    ``flags`` is the second dword of the descriptor without its base: type in bits 8-11, S 12,
    DPL 13-14, P 15, AVL 20, L 21, D/B 22, G 23 (bits 16-19 repeat the limit and count for nothing).
    ``limit`` is in bytes, scaled already.
    """

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    flags: int = 0x9300


@dataclass(frozen=True, slots=True)
class DescriptorTable:
    """GDTR or IDTR: linear address and limit in bytes."""

    base: int = 0
    limit: int = 0xFFFF


@dataclass(frozen=True, slots=True)
class Fpu:
    """The x87 unit.

    ``registers`` are R0-R7 *as stacked* (ST0 first), 80 bit integers: sign and exponent above bit
    64, mantissa below.  ``status`` has the top of the stack in bits 11-13.  ``in_use`` is one bit
    for each physical register, set where the register holds something (FXSAVE's abridged tag).

    The last instruction's opcode and pointers are defined while its exception is pending (bit 7 of
    ``status``).  AMD processors forget them otherwise (AMD APM volume 2, FXRSTOR).
    """

    control: int = 0x37F
    status: int = 0
    in_use: int = 0
    registers: tuple[int, ...] = (0,) * 8
    last_opcode: int = 0
    last_ip: int = 0
    last_dp: int = 0


@dataclass(frozen=True, slots=True)
class Events:
    """What is about to be delivered; -1 (``NOTHING_PENDING``) means none."""

    exception: int = NOTHING_PENDING
    has_error_code: int = 0
    error_code: int = 0
    exception_pending: int = 0
    exception_injected: int = 0
    exception_has_payload: int = 0
    exception_payload: int = 0
    interrupt: int = NOTHING_PENDING
    soft_interrupt: int = 0
    nmi_injected: int = 0
    nmi_pending: int = 0
    nmi_masked: int = 0
    sipi_vector: int = 0


@dataclass(frozen=True, slots=True)
class CpuState:
    """Architectural state of one vCPU.  Change it with :func:`dataclasses.replace`.

    ``xmm`` and ``ymm_high`` are 128 bit integers (bits 0-127 and 128-255 of the YMM registers);
    ``mtrr_variable`` alternates base and mask.  ``tsc`` counts since reset, ``tsc_khz`` is 0 where
    the rate is not known.  ``msrs`` holds model specific registers that have no field here
    (those of QEMU's optional subsections); ``opaque`` the values of whole optional subsections that
    only QEMU understands, by name, passed on as they came.
    """

    regs: tuple[int, ...] = (0,) * 16
    rip: int = 0xFFF0
    rflags: int = 2
    es: Segment = Segment()
    cs: Segment = Segment(0xF000, 0xFFFF0000, 0xFFFF, 0x9B00)
    ss: Segment = Segment()
    ds: Segment = Segment()
    fs: Segment = Segment()
    gs: Segment = Segment()
    ldt: Segment = Segment(flags=0x8200)
    tr: Segment = Segment(flags=0x8B00)
    gdt: DescriptorTable = DescriptorTable()
    idt: DescriptorTable = DescriptorTable()
    cr0: int = 0x60000010
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    dr: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400)
    fpu: Fpu = Fpu()
    mxcsr: int = 0x1F80
    xmm: tuple[int, ...] = (0,) * 16
    ymm_high: tuple[int, ...] = (0,) * 16
    xcr0: int = 1
    xstate_bv: int = 0
    efer: int = 0
    star: int = 0
    lstar: int = 0
    cstar: int = 0
    fmask: int = 0
    kernel_gs_base: int = 0
    sysenter_cs: int = 0
    sysenter_esp: int = 0
    sysenter_eip: int = 0
    pat: int = 0x0007040600070406
    mtrr_fixed: tuple[int, ...] = (0,) * 11
    mtrr_deftype: int = 0
    mtrr_variable: tuple[int, ...] = (0,) * 16
    tsc: int = 0
    tsc_aux: int = 0
    tsc_khz: int = 0
    mcg_cap: int = 0
    mcg_status: int = 0
    mcg_ctl: int = 0
    mce_banks: tuple[int, ...] = (0,) * 40
    system_time_msr: int = 0
    wall_clock_msr: int = 0
    smbase: int = 0x30000
    apic_base: int = 0xFEE00900
    events: Events = Events()
    mp_state: int = MP_RUNNABLE
    halted: int = 0
    interrupt_request: int = 0
    msrs: Mapping[int, int] = field(default_factory=dict)
    opaque: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def privilege(self) -> int:
        """The current privilege level, 0 to 3."""
        return self.ss.flags >> 13 & 3

    @property
    def runs(self) -> bool:
        """Whether there is anything to run.

        A halted vCPU, or one that waits for another's start signal, stands still for ever in a
        machine without interrupts.
        """
        return not self.halted and self.mp_state == MP_RUNNABLE

    def reg(self, name: str) -> int:
        """A general register by its name, such as ``rax``."""
        return self.regs[GENERAL.index(name)]

    def with_regs(self, **values: int) -> Self:
        """The same state with other values in some general registers: ``with_regs(rax=1)``."""
        regs = list(self.regs)
        for name, value in values.items():
            regs[GENERAL.index(name)] = value
        return replace(self, regs=tuple(regs))


def flat_long_mode(*, rip: int, rsp: int, cr3: int, privilege: int = 3) -> CpuState:
    """A vCPU about to run 64-bit code with paging on and segments that do nothing.

    Everything a small guest may use is switched on: SSE, no-execute, write protection, and port I/O
    from privilege 3 (IOPL 3 in the flags).  Interrupts are off, and there are no descriptor tables.

    :param cr3: guest physical address of the top page table.
    """
    code = Segment(0x08 | privilege, 0, 0xFFFFFFFF, 0x00A09B00 | privilege << 13)
    data = Segment(0x10 | privilege, 0, 0xFFFFFFFF, 0x00C09300 | privilege << 13)
    state = CpuState(rip=rip, rflags=0x3002, cr0=0x80050033, cr3=cr3, cr4=0x620, efer=0xD00)
    state = replace(state, cs=code, es=data, ss=data, ds=data, fs=data, gs=data)
    state = replace(state, gdt=DescriptorTable(0, 0), idt=DescriptorTable(0, 0))
    return state.with_regs(rsp=rsp)


@dataclass(frozen=True, slots=True)
class Msr:
    """Where the value of a model specific register lives in :class:`CpuState`."""

    index: int
    field: str
    position: int | None = None


def _run(first: int, name: str, count: int) -> tuple[Msr, ...]:
    return tuple(Msr(first + number, name, number) for number in range(count))


_FIXED_MTRRS = (0x250, 0x258, 0x259, *range(0x268, 0x270))

MSRS: tuple[Msr, ...] = (
    Msr(0x010, "tsc"),
    Msr(0x174, "sysenter_cs"),
    Msr(0x175, "sysenter_esp"),
    Msr(0x176, "sysenter_eip"),
    Msr(0x277, "pat"),
    Msr(0x2FF, "mtrr_deftype"),
    Msr(0xC0000081, "star"),
    Msr(0xC0000082, "lstar"),
    Msr(0xC0000083, "cstar"),
    Msr(0xC0000084, "fmask"),
    Msr(0xC0000102, "kernel_gs_base"),
    Msr(0xC0000103, "tsc_aux"),
    Msr(0x4B564D00, "wall_clock_msr"),
    Msr(0x4B564D01, "system_time_msr"),
    *_run(0x200, "mtrr_variable", 16),
    *(Msr(index, "mtrr_fixed", number) for number, index in enumerate(_FIXED_MTRRS)),
)
"""The MSRs that have a field.  FS, GS and EFER are not here: they travel with the segments."""
