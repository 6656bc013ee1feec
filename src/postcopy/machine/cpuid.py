"""What CPUID tells a guest on KVM: what the host has, less what our saved state cannot carry.

A guest may only use what every destination has.  :class:`CpuState` carries the x87,
SSE and AVX registers and the MSRs it lists; so wider vectors (AVX-512, AMX), protection keys,
control-flow enforcement, nested virtualisation, performance counters, speculation control and KVM's
own paravirtual features are hidden, and the leaves that only describe them are emptied.
(Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.)
"""

from collections.abc import Iterable

from postcopy.abi.kvm import kvm_cpuid_entry2

XCR0_CARRIED = 0b111
"""x87, SSE, AVX."""

_XSAVE_LEGACY_BYTES = 576
_XSAVE_AVX_BYTES = 832
_XSAVES = 1 << 3


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


_HIDDEN = {
    # DTES64, MONITOR, VMX, SMX, PDCM, x2APIC, TSC deadline timer
    (0x1, 0, "ecx"): _bits(2, 3, 5, 6, 15, 21, 24),
    # SGX, MPX, PQM, PQE, AVX-512 F DQ IFMA PF ER CD BW VL, processor trace
    (0x7, 0, "ebx"): _bits(2, 12, 14, 15, 16, 17, 21, 25, 26, 27, 28, 30, 31),
    # AVX-512 VBMI VBMI2 VNNI BITALG VPOPCNTDQ, PKU, OSPKE, WAITPKG, CET_SS, LA57, key locker,
    # SGX_LC, PKS
    (0x7, 0, "ecx"): _bits(1, 3, 4, 5, 6, 7, 11, 12, 14, 16, 23, 30, 31),
    # AVX-512 4VNNIW 4FMAPS VP2INTERSECT FP16, user interrupts, last branch records, CET_IBT,
    # AMX BF16 TILE INT8, speculation control, ARCH_CAPABILITIES, SSBD
    (0x7, 0, "edx"): _bits(2, 3, 5, 8, 19, 20, 22, 23, 24, 25, 26, 27, 29, 31),
    # SVM, IBS, lightweight profiling, performance counters, MONITORX
    (0x80000001, 0, "ecx"): _bits(2, 10, 15, 23, 24, 28, 29),
    # All speculation control of AMD
    (0x80000008, 0, "ebx"): 0xFFFFF000,
}
_EMPTY_LEAVES = frozenset(
    # monitor, performance counters, PQM, PQE, SGX, processor trace, key locker, AMX, LBR, AVX10,
    # SVM, IBS, KVM's features
    {
        *(0x5, 0xA, 0xF, 0x10, 0x12, 0x14, 0x19, 0x1C, 0x1D, 0x1E, 0x24),
        *(0x8000000A, 0x8000001B, 0x40000001),
    }
)


def carried(entries: Iterable[kvm_cpuid_entry2], vcpu: int) -> list[kvm_cpuid_entry2]:
    """The same leaves with everything hidden that cannot move, for the vCPU of that number."""
    return [_carried(kvm_cpuid_entry2.from_buffer_copy(entry), vcpu) for entry in entries]


def physical_address_bits(entries: Iterable[kvm_cpuid_entry2]) -> int:
    """How many bits a guest physical address has; 36 where CPUID does not say it."""
    leaves = (entry.eax & 0xFF for entry in entries if entry.function == 0x80000008)
    return next(leaves, 36)


def _carried(entry: kvm_cpuid_entry2, vcpu: int) -> kvm_cpuid_entry2:
    if entry.function in _EMPTY_LEAVES or (entry.function == 0x7 and entry.index > 0):
        _empty(entry)
    elif entry.function == 0xD:
        _limit_xsave(entry)
    elif entry.function == 0x1:
        entry.ebx = entry.ebx & 0x00FFFFFF | vcpu << 24  # the APIC's number
    elif entry.function in {0xB, 0x1F}:
        entry.edx = vcpu
    for register in ("ebx", "ecx", "edx"):
        hidden = _HIDDEN.get((entry.function, entry.index, register), 0)
        setattr(entry, register, getattr(entry, register) & ~hidden)
    return entry


def _limit_xsave(entry: kvm_cpuid_entry2) -> None:
    has_avx = entry.index != 0 or bool(entry.eax & 4)
    size_bytes = _XSAVE_AVX_BYTES if has_avx else _XSAVE_LEGACY_BYTES
    if entry.index == 0:
        entry.eax &= XCR0_CARRIED
        entry.ebx = entry.ecx = size_bytes
        entry.edx = 0
    elif entry.index == 1:
        entry.eax &= ~_XSAVES
        entry.ebx = entry.ecx = entry.edx = 0
    elif entry.index > 2:
        _empty(entry)


def _empty(entry: kvm_cpuid_entry2) -> None:
    entry.eax = entry.ebx = entry.ecx = entry.edx = 0
