"""Between :class:`CpuState` and the values of QEMU's sections ``cpu`` and ``cpu_common``.

What QEMU's section has no field for is not sent: the error code of an exception in delivery (QEMU drops
it, too), ``cr8`` and ``apic_base`` (see ``cpu_state``).  What our state has no field for is
derived (``hflags``), constant (A20, SVM: no nested guests), or carried along unread (``opaque``).

QEMU's KVM and TCG disagree over the order of the x87 registers when the stack's top is not 0: KVM
sends them as stacked, TCG by their physical numbers, and nothing in the section says which.  We
take and send them as KVM does; a guest in the middle of an x87 calculation that moves between TCG
and anything else gets its stack rotated, with QEMU at both ends as much as with us.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from postcopy.errors import GuestError
from postcopy.machine.cpu_formats import SUBSECTION_MSRS, SUBSECTIONS
from postcopy.machine.cpu_state import (
    NOTHING_PENDING,
    SEGMENTS,
    CpuState,
    DescriptorTable,
    Events,
    Fpu,
    Segment,
)
from postcopy.stream.vmstate import Values

_LOW_64: Final = (1 << 64) - 1

_SAME: Final = {
    "rip": "env.eip",
    "rflags": "env.eflags",
    "regs": "env.regs",
    "sysenter_cs": "env.sysenter_cs",
    "sysenter_esp": "env.sysenter_esp",
    "sysenter_eip": "env.sysenter_eip",
    "cr0": "env.cr[0]",
    "cr2": "env.cr[2]",
    "cr3": "env.cr[3]",
    "cr4": "env.cr[4]",
    "dr": "env.dr",
    "mxcsr": "env.mxcsr",
    "efer": "env.efer",
    "star": "env.star",
    "lstar": "env.lstar",
    "cstar": "env.cstar",
    "fmask": "env.fmask",
    "kernel_gs_base": "env.kernelgsbase",
    "smbase": "env.smbase",
    "pat": "env.pat",
    "mtrr_fixed": "env.mtrr_fixed",
    "mtrr_deftype": "env.mtrr_deftype",
    "mp_state": "env.mp_state",
    "tsc": "env.tsc",
    "mcg_cap": "env.mcg_cap",
    "mcg_status": "env.mcg_status",
    "mcg_ctl": "env.mcg_ctl",
    "mce_banks": "env.mce_banks",
    "tsc_aux": "env.tsc_aux",
    "system_time_msr": "env.system_time_msr",
    "wall_clock_msr": "env.wall_clock_msr",
    "xcr0": "env.xcr0",
}
"""Fields of :class:`CpuState` that stand in the section as they are."""

_CONSTANT: Final = {
    "env.fpregs_format_vmstate": 0,
    "env.a20_mask": -1,
    **dict.fromkeys(("env.vm_hsave", "env.vm_vmcb", "env.tsc_offset", "env.intercept"), 0),
    **dict.fromkeys(("env.intercept_cr_read", "env.intercept_cr_write"), 0),
    **dict.fromkeys(("env.intercept_dr_read", "env.intercept_dr_write"), 0),
    **dict.fromkeys(("env.intercept_exceptions", "env.v_tpr"), 0),
}

_MXCSR_AT_RESET: Final = 0x1F80
_HFLAGS2: Final = 0x101  # global interrupt flag and its virtual twin: set unless SVM clears them
_HFLAGS2_NMI: Final = 1 << 2
_HFLAGS_SMM: Final = 1 << 19
_HFLAGS_NESTED: Final = 1 << 21


def hflags(state: CpuState) -> int:
    """QEMU's summary of the processor's mode, which its software CPU (TCG) decodes by.

    TCG mends nothing but the privilege level, so every bit must be right: a wrong CS64 makes it run
    64-bit code as 32-bit code.  KVM computes its own.
    """
    flags = state.privilege
    flags |= (state.cr0 & 1) << 7  # PE
    flags |= (state.cr0 & 0b1110) << 8  # MP, EM, TS
    flags |= state.rflags & 0x23100  # VM, IOPL, TF
    flags |= (state.cr4 >> 9 & 1) << 22  # OSFXSR
    flags |= (state.cr4 >> 11 & 1) << 27  # UMIP
    flags |= (state.efer >> 10 & 1) << 14  # LMA
    flags |= (state.efer >> 12 & 1) << 20  # SVME
    if state.cr4 & 1 << 21 and state.privilege != 3:
        flags |= 1 << 23  # SMAP
    if state.cr4 & 1 << 18 and state.xcr0 & 6 == 6:
        flags |= 1 << 28  # AVX
    if state.efer & 1 << 10 and state.cs.flags & 1 << 21:
        return flags | 1 << 4 | 1 << 5 | 1 << 15  # CS32, SS32, CS64
    flags |= (state.cs.flags >> 22 & 1) << 4
    flags |= (state.ss.flags >> 22 & 1) << 5
    return flags | _adds_segment_base(state) << 6


def _adds_segment_base(state: CpuState) -> int:
    """Whether code outside 64-bit mode must add the bases of DS, ES and SS to addresses."""
    real_mode_like = not state.cr0 & 1 or state.rflags & 1 << 17 or not state.cs.flags & 1 << 22
    return int(bool(real_mode_like or state.ds.base | state.es.base | state.ss.base))


def live_components(state: CpuState) -> int:
    """XSTATE_BV: the components that are not in their initial state, whatever the state claims.

    A component whose bit is clear is initialised when the state is loaded, and QEMU's software CPU
    clears them all.
    """
    live = state.xstate_bv
    live |= int(state.fpu != Fpu())
    live |= int(any(state.xmm) or state.mxcsr != _MXCSR_AT_RESET) << 1
    return live | int(any(state.ymm_high)) << 2


def cpu_values(state: CpuState) -> dict[str, Any]:
    """The values of the section ``cpu`` (format ``cpu_formats.CPU``)."""
    values: dict[str, Any] = {wire: getattr(state, name) for name, wire in _SAME.items()}
    values |= _CONSTANT
    values |= _fpu_values(state.fpu) | _event_values(state.events)
    values["env.hflags"] = hflags(state)
    values["env.hflags2"] = _HFLAGS2 | (_HFLAGS2_NMI if state.events.nmi_masked else 0)
    values["env.segs"] = tuple(_segment_values(getattr(state, name)) for name in SEGMENTS)
    values["env.ldt"], values["env.tr"] = _segment_values(state.ldt), _segment_values(state.tr)
    values["env.gdt"], values["env.idt"] = _table_values(state.gdt), _table_values(state.idt)
    values["env.xmm_regs[0]"] = _halves(state.xmm)
    values["env.xmm_regs[1]"] = _halves(state.ymm_high)
    values["env.xstate_bv"] = live_components(state)
    mtrrs = zip(state.mtrr_variable[::2], state.mtrr_variable[1::2], strict=True)
    values["env.mtrr_var"] = tuple({"base": base, "mask": mask} for base, mask in mtrrs)
    return values | _subsection_values(state) | dict(state.opaque)


def cpu_common_values(state: CpuState) -> dict[str, int]:
    """The values of the section ``cpu_common``."""
    return {"halted": state.halted, "interrupt_request": state.interrupt_request}


def state_from_values(cpu: Values, common: Values) -> CpuState:
    """The state that a pair of sections describes.

    :raises GuestError: the vCPU is where we cannot follow: in system management mode, or in a guest
        of its own.
    """
    if cpu["env.hflags"] & (_HFLAGS_SMM | _HFLAGS_NESTED):
        raise GuestError("a vCPU is in system management mode or in a nested guest; try again")
    state = CpuState(**{name: cpu[wire] for name, wire in _SAME.items()})
    segments: dict[str, Any] = {
        n: Segment(**v) for n, v in zip(SEGMENTS, cpu["env.segs"], strict=True)
    }
    state = replace(state, ldt=Segment(**cpu["env.ldt"]), tr=Segment(**cpu["env.tr"]), **segments)
    state = replace(
        state,
        gdt=DescriptorTable(cpu["env.gdt"]["base"], cpu["env.gdt"]["limit"]),
        idt=DescriptorTable(cpu["env.idt"]["base"], cpu["env.idt"]["limit"]),
        fpu=_fpu(cpu),
        events=_events(cpu),
        xmm=_joined(cpu["env.xmm_regs[0]"]),
        ymm_high=_joined(cpu["env.xmm_regs[1]"]),
        xstate_bv=cpu["env.xstate_bv"],
        mtrr_variable=tuple(
            v for pair in cpu["env.mtrr_var"] for v in (pair["base"], pair["mask"])
        ),
        halted=common["halted"],
        interrupt_request=common["interrupt_request"],
    )
    return _with_subsections(state, cpu)


def _segment_values(segment: Segment) -> dict[str, int]:
    return {name: getattr(segment, name) for name in ("selector", "base", "limit", "flags")}


def _table_values(table: DescriptorTable) -> dict[str, int]:
    return {"selector": 0, "base": table.base, "limit": table.limit, "flags": 0}


def _halves(registers: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    return tuple({"low": each & _LOW_64, "high": each >> 64} for each in registers)


def _joined(halves: tuple[Mapping[str, int], ...]) -> tuple[int, ...]:
    return tuple(each["high"] << 64 | each["low"] for each in halves)


def _fpu_values(fpu: Fpu) -> dict[str, Any]:
    values: dict[str, Any] = {
        "env.fpuc": fpu.control,
        "env.fpus_vmstate": fpu.status,
        "env.fptag_vmstate": fpu.in_use,
        "env.fpregs": tuple(
            {"mantissa": each & _LOW_64, "exponent": each >> 64} for each in fpu.registers
        ),
    }
    if fpu.last_opcode or fpu.last_ip or fpu.last_dp:
        values["cpu/fpop_ip_dp"] = {
            "env.fpop": fpu.last_opcode,
            "env.fpip": fpu.last_ip,
            "env.fpdp": fpu.last_dp,
        }
    return values


def _fpu(cpu: Values) -> Fpu:
    last = cpu.get("cpu/fpop_ip_dp", {})
    return Fpu(
        control=cpu["env.fpuc"],
        status=cpu["env.fpus_vmstate"],
        in_use=cpu["env.fptag_vmstate"],
        registers=tuple(each["exponent"] << 64 | each["mantissa"] for each in cpu["env.fpregs"]),
        last_opcode=last.get("env.fpop", 0),
        last_ip=last.get("env.fpip", 0),
        last_dp=last.get("env.fpdp", 0),
    )


def _event_values(events: Events) -> dict[str, Any]:
    values: dict[str, Any] = {
        "env.interrupt_injected": events.interrupt,
        "env.exception_nr": events.exception,
        "env.soft_interrupt": events.soft_interrupt,
        "env.nmi_injected": events.nmi_injected,
        "env.nmi_pending": events.nmi_pending,
        "env.has_error_code": events.has_error_code,
        "env.sipi_vector": events.sipi_vector,
    }
    if events.exception_pending:
        values["cpu/exception_info"] = {
            "env.exception_pending": events.exception_pending,
            "env.exception_injected": events.exception_injected,
            "env.exception_has_payload": events.exception_has_payload,
            "env.exception_payload": events.exception_payload,
        }
    return values


def _events(cpu: Values) -> Events:
    info = cpu.get("cpu/exception_info", {})
    # Without more said of it, a named exception is one whose delivery had begun.
    injected = int(cpu["env.exception_nr"] != NOTHING_PENDING)
    return Events(
        exception=cpu["env.exception_nr"],
        has_error_code=cpu["env.has_error_code"],
        exception_pending=info.get("env.exception_pending", 0),
        exception_injected=info.get("env.exception_injected", injected),
        exception_has_payload=info.get("env.exception_has_payload", 0),
        exception_payload=info.get("env.exception_payload", 0),
        interrupt=cpu["env.interrupt_injected"],
        soft_interrupt=cpu["env.soft_interrupt"],
        nmi_injected=cpu["env.nmi_injected"],
        nmi_pending=cpu["env.nmi_pending"],
        nmi_masked=int(bool(cpu["env.hflags2"] & _HFLAGS2_NMI)),
        sipi_vector=cpu["env.sipi_vector"],
    )


_OWN_SUBSECTIONS: Final = frozenset(
    {"cpu/fpop_ip_dp", "cpu/exception_info", "cpu/tsc_khz", *SUBSECTION_MSRS}
)


def _subsection_values(state: CpuState) -> dict[str, dict[str, int]]:
    """Subsections for the MSRs that hold something, and for the rate of the TSC if it is known."""
    fields = {each.name: each.fields[0].name for each in SUBSECTIONS}
    values = {}
    for name, index in SUBSECTION_MSRS.items():
        if index in state.msrs:
            values[name] = {fields[name]: state.msrs[index]}
    if state.tsc_khz:
        values["cpu/tsc_khz"] = {"env.tsc_khz": state.tsc_khz}
    return values


def _with_subsections(state: CpuState, cpu: Values) -> CpuState:
    present = [name for name in cpu if name.startswith("cpu/")]
    msrs = {
        SUBSECTION_MSRS[name]: next(iter(cpu[name].values()))
        for name in present
        if name in SUBSECTION_MSRS
    }
    return replace(
        state,
        msrs=msrs,
        opaque={name: cpu[name] for name in present if name not in _OWN_SUBSECTIONS},
        tsc_khz=cpu.get("cpu/tsc_khz", {}).get("env.tsc_khz", 0),
    )
