"""The state of a KVM vCPU as a :class:`CpuState`, and back.

A state is written in the order that the kernel needs: the mode (SREGS) decides what the other
registers may hold, and events come last so that nothing later cancels them.  The vCPU must have
its CPUID, and must have left ``KVM_RUN`` by a kick (then no half-done IN or OUT is left over).

What does not move, and why, is said in ``cpu_state``.
"""

import ctypes
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from postcopy.abi import kvm as abi
from postcopy.errors import GuestError, KernelError
from postcopy.kernel.kvm import KvmVcpu
from postcopy.machine.cpu_formats import MSR_DEFAULTS, SUBSECTION_MSRS
from postcopy.machine.cpu_state import (
    GENERAL,
    MSRS,
    NOTHING_PENDING,
    SEGMENTS,
    CpuState,
    DescriptorTable,
    Events,
    Segment,
)
from postcopy.machine.xsave import KNOWN_COMPONENTS, read_xsave, write_xsave

_log = logging.getLogger(__name__)

MOST_ADDRESS_BITS: Final = 52
_CR4_PROTECTION_KEYS: Final = 1 << 22
_PKRU: Final = 1 << 9
_IOPL: Final = 3 << 12
_PLAIN: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
_SEGMENT_BITS: Final = {
    # field of struct kvm_segment: first bit in a descriptor's second dword, mask
    "type": (8, 15),
    "s": (12, 1),
    "dpl": (13, 3),
    "present": (15, 1),
    "avl": (20, 1),
    "l": (21, 1),
    "db": (22, 1),
    "g": (23, 1),
}


def read_kvm_state(vcpu: KvmVcpu) -> CpuState:
    """The state of a vCPU that stands still.

    :raises GuestError: the guest uses registers that have no place in a :class:`CpuState`.
    :raises KernelError: KVM does not give it.
    """
    sregs, regs, debug = vcpu.get_sregs(), vcpu.get_regs(), vcpu.get_debugregs()
    segments: dict[str, Any] = {n: _segment(getattr(sregs, n)) for n in (*SEGMENTS, "tr", "ldt")}
    state = CpuState(
        regs=tuple(getattr(regs, name) for name in GENERAL),
        rip=regs.rip,
        rflags=regs.rflags,
        gdt=DescriptorTable(sregs.gdt.base, sregs.gdt.limit),
        idt=DescriptorTable(sregs.idt.base, sregs.idt.limit),
        apic_base=sregs.apic_base,
        # DR4 and DR5 are other names of DR6 and DR7, and QEMU sends them so.
        dr=(*debug.db, debug.dr6, debug.dr7, debug.dr6, debug.dr7),
        xcr0=_read_xcr0(vcpu),
        tsc_khz=vcpu.tsc_khz,
        mp_state=vcpu.get_mp_state().mp_state,
        events=_read_events(vcpu),
        **segments,
    )
    state = replace(state, **{name: getattr(sregs, name) for name in _PLAIN})
    state = read_xsave(bytes(vcpu.get_xsave()), _with_msrs(state, vcpu))
    _refuse_unknown_components(state)
    return replace(state, xstate_bv=state.xstate_bv & KNOWN_COMPONENTS)


def write_kvm_state(
    vcpu: KvmVcpu, state: CpuState, address_bits: int = MOST_ADDRESS_BITS
) -> tuple[int, ...]:
    """Load a state into a vCPU that has its CPUID and stands still.

    Whether a halted vCPU runs is the machine's business (:attr:`CpuState.runs`): without an
    interrupt controller KVM knows runnable ones only.

    :param address_bits: of a guest physical address here.
    :return: the MSRs that this host does not have and that held nothing, for the log.
    :raises GuestError: this host refuses a value that the guest needs; which one is said.
    """
    try:
        _write_sregs(vcpu, state)
        _write_xcr0(vcpu, state.xcr0)
        _write_vectors(vcpu, state)
        _write_tsc_rate(vcpu, state.tsc_khz)
        skipped = _write_msrs(vcpu, _with_short_mtrr_masks(state, address_bits))
        _write_regs(vcpu, state)
        vcpu.set_debugregs(_debugregs(state))
        vcpu.set_mp_state(abi.kvm_mp_state(abi.KVM_MP_STATE_RUNNABLE))
        _write_events(vcpu, state.events)
    except KernelError as error:
        raise GuestError(f"this host's KVM refuses the state of a vCPU: {error}") from error
    return skipped


def with_lost_iopl(state: CpuState, loaded: CpuState | None) -> CpuState:
    """``state`` as read, with the I/O privilege that the host's KVM may have forgotten.

    Under PVM (a KVM for nested guests) RFLAGS loses IOPL when the guest runs, and port I/O works
    regardless.  Elsewhere the guest's next OUT would then be a fault.  User code cannot change
    IOPL, so as long as it had no way into a kernel, the value that was loaded is still the true one.
    """
    if loaded is None or loaded.privilege != 3 or loaded.lstar or loaded.idt.limit:
        return state
    return replace(state, rflags=state.rflags | loaded.rflags & _IOPL)


def _segment(kvm: abi.kvm_segment) -> Segment:
    flags = 0
    if not kvm.unusable:
        for name, (shift, mask) in _SEGMENT_BITS.items():
            flags |= (getattr(kvm, name) & mask) << shift
    return Segment(kvm.selector, kvm.base, kvm.limit, flags)


def _kvm_segment(segment: Segment) -> abi.kvm_segment:
    bits = {n: segment.flags >> shift & mask for n, (shift, mask) in _SEGMENT_BITS.items()}
    return abi.kvm_segment(
        base=segment.base,
        limit=segment.limit,
        selector=segment.selector,
        unusable=int(not bits["present"]),
        **bits,
    )


def _write_sregs(vcpu: KvmVcpu, state: CpuState) -> None:
    sregs = vcpu.get_sregs()  # keeps the APIC's base, which is this host's
    for name in (*SEGMENTS, "tr", "ldt"):
        setattr(sregs, name, _kvm_segment(getattr(state, name)))
    for name in _PLAIN:
        setattr(sregs, name, getattr(state, name))
    sregs.gdt.base, sregs.gdt.limit = state.gdt.base, state.gdt.limit
    sregs.idt.base, sregs.idt.limit = state.idt.base, state.idt.limit
    ctypes.memset(sregs.interrupt_bitmap, 0, ctypes.sizeof(sregs.interrupt_bitmap))
    vcpu.set_sregs(sregs)


def _write_regs(vcpu: KvmVcpu, state: CpuState) -> None:
    values = dict(zip(GENERAL, state.regs, strict=True))
    vcpu.set_regs(abi.kvm_regs(rip=state.rip, rflags=state.rflags, **values))


def _read_xcr0(vcpu: KvmVcpu) -> int:
    xcrs = vcpu.get_xcrs()
    return xcrs.xcrs[0].value if xcrs.nr_xcrs else 1


def _write_xcr0(vcpu: KvmVcpu, value: int) -> None:
    if value == _read_xcr0(vcpu):
        return  # a processor without XSAVE has none to set
    xcrs = abi.kvm_xcrs(nr_xcrs=1)
    xcrs.xcrs[0].value = value
    vcpu.set_xcrs(xcrs)


def _refuse_unknown_components(state: CpuState) -> None:
    """Refuse to forget vector state: what is enabled, in use, and not ours to move."""
    reachable = state.xcr0 | (_PKRU if state.cr4 & _CR4_PROTECTION_KEYS else 0)
    lost = state.xstate_bv & reachable & ~KNOWN_COMPONENTS
    if lost:
        names = ", ".join(str(bit) for bit in range(64) if lost >> bit & 1)
        raise GuestError(
            f"the guest uses XSAVE components {names} (beyond x87, SSE and AVX), which cannot be "
            "moved; hide them from it in CPUID"
        )


def _write_vectors(vcpu: KvmVcpu, state: CpuState) -> None:
    if state.opaque.get("cpu/avx512"):
        raise GuestError("the guest uses AVX-512; start it with a CPU model without")
    area = bytearray(bytes(vcpu.get_xsave()))
    write_xsave(area, state)
    vcpu.set_xsave(abi.kvm_xsave.from_buffer(area))


def _with_msrs(state: CpuState, vcpu: KvmVcpu) -> CpuState:
    values = vcpu.get_msrs([*(msr.index for msr in MSRS), *SUBSECTION_MSRS.values()])
    changes: dict[str, Any] = {}
    for msr in MSRS:
        value = values.get(msr.index, 0)
        if msr.position is None:
            changes[msr.field] = value
        else:
            changes.setdefault(msr.field, []).append(value)
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()}
    extra = {
        index: values[index]
        for index in SUBSECTION_MSRS.values()
        if values.get(index, 0) not in (0, MSR_DEFAULTS.get(index, 0))
    }
    return replace(state, msrs=extra, **changes)


def _write_tsc_rate(vcpu: KvmVcpu, khz: int) -> None:
    """Let the time stamp counter run on at the rate it had, where the host can scale it.

    Elsewhere it runs at the host's rate from now on, as it does in QEMU.
    """
    here = vcpu.tsc_khz
    if khz in {0, here}:
        return
    try:
        vcpu.set_tsc_khz(khz)
    except KernelError:
        _log.warning(
            "the guest's time stamp counter ran at %d kHz and runs at %d kHz from now on: this host's "
            "processor cannot scale it; its clocks go wrong unless they are kept from elsewhere",
            khz,
            here,
        )


def _write_msrs(vcpu: KvmVcpu, state: CpuState) -> tuple[int, ...]:
    values = dict(_msr_values(state))
    refused = vcpu.set_msrs(values)
    present = vcpu.get_msrs(refused)
    for index in refused:
        harmless = (0, MSR_DEFAULTS.get(index, 0), present.get(index, 0))
        if values[index] not in harmless:
            raise GuestError(
                f"this host's KVM refuses {values[index]:#x} in MSR {index:#x}; the guest uses it"
            )
    return refused


def _msr_values(state: CpuState) -> Iterable[tuple[int, int]]:
    for msr in MSRS:
        value = getattr(state, msr.field)
        yield msr.index, value if msr.position is None else value[msr.position]
    yield from state.msrs.items()


def _with_short_mtrr_masks(state: CpuState, address_bits: int) -> CpuState:
    """MTRR masks without address bits that a guest does not have here.

    QEMU on KVM sends masks filled up with ones to 52 bits, whatever its host has, and cuts them off
    when it loads them, as we do here: else KVM refuses them.
    """
    shortest = (1 << address_bits) - 1
    pairs = enumerate(state.mtrr_variable)
    return replace(state, mtrr_variable=tuple(v & shortest if n % 2 else v for n, v in pairs))


def _debugregs(state: CpuState) -> abi.kvm_debugregs:
    debug = abi.kvm_debugregs(dr6=state.dr[6], dr7=state.dr[7])
    debug.db[:] = state.dr[:4]
    return debug


def _read_events(vcpu: KvmVcpu) -> Events:
    kvm = vcpu.get_vcpu_events()
    # Without KVM_CAP_EXCEPTION_PAYLOAD a pending exception is as good as one in delivery.
    delivered = kvm.exception.injected or kvm.exception.pending
    return Events(
        exception=kvm.exception.nr if delivered else NOTHING_PENDING,
        has_error_code=kvm.exception.has_error_code if delivered else 0,
        error_code=kvm.exception.error_code if delivered else 0,
        exception_injected=int(bool(delivered)),
        interrupt=kvm.interrupt.nr if kvm.interrupt.injected else NOTHING_PENDING,
        soft_interrupt=kvm.interrupt.soft,
        nmi_injected=kvm.nmi.injected,
        nmi_pending=kvm.nmi.pending,
        nmi_masked=kvm.nmi.masked,
        sipi_vector=kvm.sipi_vector,
    )


def _write_events(vcpu: KvmVcpu, events: Events) -> None:
    kvm = abi.kvm_vcpu_events(
        sipi_vector=events.sipi_vector,
        flags=abi.KVM_VCPUEVENT_VALID_NMI_PENDING | abi.KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    )
    if events.exception != NOTHING_PENDING:
        kvm.exception.injected = 1
        kvm.exception.nr = events.exception
        kvm.exception.has_error_code = events.has_error_code
        kvm.exception.error_code = events.error_code
    if events.interrupt != NOTHING_PENDING:
        kvm.interrupt.injected, kvm.interrupt.nr = 1, events.interrupt
        kvm.interrupt.soft = events.soft_interrupt
    kvm.nmi.injected, kvm.nmi.pending = events.nmi_injected, events.nmi_pending
    kvm.nmi.masked = events.nmi_masked
    vcpu.set_vcpu_events(kvm)
