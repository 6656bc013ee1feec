"""The section ``cpu`` of an x86-64 vCPU as QEMU 10.0 writes it: version 12, 1817 bytes or more.

The fields are known from the JSON descriptions at the end of real streams (TCG and KVM), those of
the subsections from streams with hand-made ones that QEMU loaded and sent on; a test does both
again.  Subsections not listed here (nested virtualisation, Hyper-V, Xen, AMX, PT, SGX) are refused
by name: a guest that uses what they carry could not run on here.
"""

from typing import Final

from postcopy.stream.vmstate import I32, I64, U8, U16, U32, U64, Field, Format, Kind, Structure

SEGMENT = Structure(
    "segment",
    (Field("selector", U32), Field("base", U64), Field("limit", U32), Field("flags", U32)),
)
FPU_REGISTER = Structure("fpreg", (Field("mantissa", U64), Field("exponent", U16)), version=0)
MTRR = Structure("mtrr_var", (Field("base", U64), Field("mask", U64)))
XMM = Structure("xmm_reg", (Field("low", U64), Field("high", U64)))
YMM_HIGH = Structure("ymmh_reg", (Field("low", U64), Field("high", U64)))
BOUND = Structure("bnd_regs", (Field("lb", U64), Field("ub", U64)))
ZMM_HIGH = Structure("zmmh_reg", (Field("quads", U64, 4),))
HI16_ZMM = Structure("hi16_zmm_reg", (Field("quads", U64, 8),))

CORE = (
    Field("env.regs", U64, 16),
    Field("env.eip", U64),
    Field("env.eflags", U64),
    Field("env.hflags", U32),
)
FPU = (
    Field("env.fpuc", U16),
    Field("env.fpus_vmstate", U16),
    Field("env.fptag_vmstate", U16),
    Field("env.fpregs_format_vmstate", U16),
    Field("env.fpregs", FPU_REGISTER, 8),
)
SYSTEM = (
    Field("env.segs", SEGMENT, 6),
    Field("env.ldt", SEGMENT),
    Field("env.tr", SEGMENT),
    Field("env.gdt", SEGMENT),
    Field("env.idt", SEGMENT),
    Field("env.sysenter_cs", U32),
    Field("env.sysenter_esp", U64),
    Field("env.sysenter_eip", U64),
    Field("env.cr[0]", U64),
    Field("env.cr[2]", U64),
    Field("env.cr[3]", U64),
    Field("env.cr[4]", U64),
    Field("env.dr", U64, 8),
    Field("env.a20_mask", I32),
)
VECTORS_AND_SYSCALLS = (
    Field("env.mxcsr", U32),
    Field("env.xmm_regs[0]", XMM, 16),
    Field("env.efer", U64),
    Field("env.star", U64),
    Field("env.lstar", U64),
    Field("env.cstar", U64),
    Field("env.fmask", U64),
    Field("env.kernelgsbase", U64),
    Field("env.smbase", U32),
    Field("env.pat", U64),
    Field("env.hflags2", U32),
)
SVM = (
    Field("env.vm_hsave", U64),
    Field("env.vm_vmcb", U64),
    Field("env.tsc_offset", U64),
    Field("env.intercept", U64),
    Field("env.intercept_cr_read", U16),
    Field("env.intercept_cr_write", U16),
    Field("env.intercept_dr_read", U16),
    Field("env.intercept_dr_write", U16),
    Field("env.intercept_exceptions", U32),
    Field("env.v_tpr", U8),
)
MEMORY_TYPES = (
    Field("env.mtrr_fixed", U64, 11),
    Field("env.mtrr_deftype", U64),
    Field("env.mtrr_var", MTRR, 8),
)
PENDING = (
    Field("env.interrupt_injected", I32),
    Field("env.mp_state", U32),
    Field("env.tsc", U64),
    Field("env.exception_nr", I32),
    Field("env.soft_interrupt", U8),
    Field("env.nmi_injected", U8),
    Field("env.nmi_pending", U8),
    Field("env.has_error_code", U8),
    Field("env.sipi_vector", U32),
)
MACHINE_CHECK = (
    Field("env.mcg_cap", U64),
    Field("env.mcg_status", U64),
    Field("env.mcg_ctl", U64),
    Field("env.mce_banks", U64, 40),
)
REST = (
    Field("env.tsc_aux", U64),
    Field("env.system_time_msr", U64),
    Field("env.wall_clock_msr", U64),
    Field("env.xcr0", U64),
    Field("env.xstate_bv", U64),
    Field("env.xmm_regs[1]", YMM_HIGH, 16),
)


def _subsection(name: str, *fields: Field) -> Format:
    return Format(f"cpu/{name}", 1, fields)


def _register(name: str, field: str, kind: Kind = U64) -> Format:
    return _subsection(name, Field(f"env.{field}", kind))


SUBSECTIONS = (
    _subsection(
        "exception_info",
        Field("env.exception_pending", U8),
        Field("env.exception_injected", U8),
        Field("env.exception_has_payload", U8),
        Field("env.exception_payload", U64),
    ),
    _register("async_pf_msr", "async_pf_en_msr"),
    _register("async_pf_int_msr", "async_pf_int_msr"),
    _register("async_pv_eoi_msr", "pv_eoi_en_msr"),
    _register("steal_time_msr", "steal_time_msr"),
    _register("poll_control_msr", "poll_control_msr"),
    _subsection(
        "fpop_ip_dp", Field("env.fpop", U16), Field("env.fpip", U64), Field("env.fpdp", U64)
    ),
    _register("msr_tsc_adjust", "tsc_adjust"),
    _register("msr_tscdeadline", "tsc_deadline"),
    _register("msr_ia32_misc_enable", "msr_ia32_misc_enable"),
    _register("msr_ia32_feature_control", "msr_ia32_feature_control"),
    _subsection(
        "msr_architectural_pmu",
        Field("env.msr_fixed_ctr_ctrl", U64),
        Field("env.msr_global_ctrl", U64),
        Field("env.msr_global_status", U64),
        Field("env.msr_global_ovf_ctrl", U64),
        Field("env.msr_fixed_counters", U64, 3),
        Field("env.msr_gp_counters", U64, 18),
        Field("env.msr_gp_evtsel", U64, 18),
    ),
    _subsection(
        "mpx",
        Field("env.bnd_regs", BOUND, 4),
        Field("env.bndcs_regs.cfgu", U64),
        Field("env.bndcs_regs.sts", U64),
        Field("env.msr_bndcfgs", U64),
    ),
    _subsection(
        "avx512",
        Field("env.opmask_regs", U64, 8),
        Field("env.xmm_regs[2]", ZMM_HIGH, 16),
        Field("env.xmm_regs[3]", HI16_ZMM, 16),
    ),
    _register("xss", "xss"),
    _register("umwait", "umwait", U32),
    _register("tsc_khz", "tsc_khz", I64),
    _register("msr_smi_count", "msr_smi_count"),
    _register("pkru", "pkru", U32),
    _register("pkrs", "pkrs", U32),
    _register("spec_ctrl", "spec_ctrl"),
    _register("amd_tsc_scale_msr", "amd_tsc_scale_msr"),
    _register("mcg_ext_ctl", "mcg_ext_ctl"),
    _register("virt_ssbd", "virt_ssbd"),
    _subsection("svn_npt", Field("env.nested_cr3", U64), Field("env.nested_pg_mode", U32)),
    _subsection("svm_guest", Field("env.int_ctl", U32)),
    _register("msr_tsx_ctrl", "tsx_ctrl", U32),
    _subsection("pdptrs", Field("env.pdptrs", U64, 4)),
    _subsection("msr_xfd", Field("env.msr_xfd", U64), Field("env.msr_xfd_err", U64)),
    _register("msr_hwcr", "msr_hwcr"),
    _register("triple_fault", "triple_fault_pending", U8),
)
"""In QEMU's order."""

CPU = Format(
    "cpu",
    12,
    (
        *(CORE + FPU + SYSTEM + VECTORS_AND_SYSCALLS),
        *(SVM + MEMORY_TYPES + PENDING + MACHINE_CHECK + REST),
    ),
    SUBSECTIONS,
    minimum_version=11,
)

CPU_COMMON = Format(
    "cpu_common", 1, (Field("halted", U32), Field("interrupt_request", U32)), minimum_version=1
)

SUBSECTION_MSRS: Final = {
    "cpu/async_pf_msr": 0x4B564D02,
    "cpu/async_pf_int_msr": 0x4B564D06,
    "cpu/async_pv_eoi_msr": 0x4B564D04,
    "cpu/steal_time_msr": 0x4B564D03,
    "cpu/poll_control_msr": 0x4B564D05,
    "cpu/msr_tsc_adjust": 0x3B,
    "cpu/msr_tscdeadline": 0x6E0,
    "cpu/msr_ia32_misc_enable": 0x1A0,
    "cpu/msr_ia32_feature_control": 0x3A,
    "cpu/xss": 0xDA0,
    "cpu/umwait": 0xE1,
    "cpu/msr_smi_count": 0x34,
    "cpu/pkrs": 0x6E1,
    "cpu/spec_ctrl": 0x48,
    "cpu/amd_tsc_scale_msr": 0xC0000104,
    "cpu/mcg_ext_ctl": 0x4D0,
    "cpu/virt_ssbd": 0xC001011F,
    "cpu/msr_tsx_ctrl": 0x122,
    "cpu/msr_hwcr": 0xC0010015,
}
"""Subsections of one field that is an MSR, and which."""

MSR_DEFAULTS: Final = {0x4B564D05: 1, 0x1A0: 1, 0xC0000104: 1 << 32}
"""Values at which QEMU does not send a subsection; for all others it is 0."""
