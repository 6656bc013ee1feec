"""What ``<linux/kvm.h>`` says about the requests that a small x86-64 machine needs.

Structures that end in an array without a length (``kvm_cpuid2``, ``kvm_msrs``)
stand here without the array, as their size in the request's number wants it; a subclass adds it.
"""

import ctypes
import enum

from postcopy.abi.ioctl import io, ior, iow, iowr

HEADER = "<linux/kvm.h>"

KVMIO = 0xAE
KVM_API_VERSION = 12

KVM_CAP_IMMEDIATE_EXIT = 136

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0

KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0

KVM_EXIT_IO_OUT = 1

KVM_MP_STATE_RUNNABLE = 0

KVM_VCPUEVENT_VALID_NMI_PENDING = 0x01
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 0x02


class Exit(enum.IntEnum):
    """``KVM_EXIT_*``: why ``KVM_RUN`` came back; those that x86 without an irqchip can give."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    X86_BUS_LOCK = 33
    NOTIFY = 37


C_NAMES: dict[type[enum.IntEnum | enum.IntFlag], str] = {Exit: "KVM_EXIT_{}"}


class kvm_regs(ctypes.Structure):
    """``struct kvm_regs``: the general registers"""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
        )
    ]


class kvm_segment(ctypes.Structure):
    """``struct kvm_segment``: a segment register with its hidden part; the limit is in bytes"""

    _fields_ = [
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("selector", ctypes.c_uint16),
        ("type", ctypes.c_uint8),
        ("present", ctypes.c_uint8),
        ("dpl", ctypes.c_uint8),
        ("db", ctypes.c_uint8),
        ("s", ctypes.c_uint8),
        ("l", ctypes.c_uint8),
        ("g", ctypes.c_uint8),
        ("avl", ctypes.c_uint8),
        ("unusable", ctypes.c_uint8),
        ("padding", ctypes.c_uint8),
    ]


class kvm_dtable(ctypes.Structure):
    """``struct kvm_dtable``: GDTR or IDTR"""

    _fields_ = [
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint16),
        ("padding", ctypes.c_uint16 * 3),
    ]


class kvm_sregs(ctypes.Structure):
    """``struct kvm_sregs``: segments, tables and control registers"""

    _fields_ = [
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, kvm_dtable) for name in ("gdt", "idt")),
        *((name, ctypes.c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")),
        ("apic_base", ctypes.c_uint64),
        ("interrupt_bitmap", ctypes.c_uint64 * 4),
    ]


class kvm_xsave(ctypes.Structure):
    """``struct kvm_xsave``: what XSAVE writes, in the standard layout"""

    _fields_ = [("region", ctypes.c_uint32 * 1024)]


class kvm_xcr(ctypes.Structure):
    """``struct kvm_xcr``"""

    _fields_ = [
        ("xcr", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("value", ctypes.c_uint64),
    ]


class kvm_xcrs(ctypes.Structure):
    """``struct kvm_xcrs``: XCR0 is all there is"""

    _fields_ = [
        ("nr_xcrs", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("xcrs", kvm_xcr * 16),
        ("padding", ctypes.c_uint64 * 16),
    ]


class kvm_msr_entry(ctypes.Structure):
    """``struct kvm_msr_entry``"""

    _fields_ = [
        ("index", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("data", ctypes.c_uint64),
    ]


class kvm_msrs(ctypes.Structure):
    """``struct kvm_msrs`` without its entries"""

    _fields_ = [("nmsrs", ctypes.c_uint32), ("pad", ctypes.c_uint32)]


class kvm_cpuid_entry2(ctypes.Structure):
    """``struct kvm_cpuid_entry2``: what CPUID answers for one leaf and subleaf"""

    _fields_ = [
        ("function", ctypes.c_uint32),
        ("index", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("eax", ctypes.c_uint32),
        ("ebx", ctypes.c_uint32),
        ("ecx", ctypes.c_uint32),
        ("edx", ctypes.c_uint32),
        ("padding", ctypes.c_uint32 * 3),
    ]


class kvm_cpuid2(ctypes.Structure):
    """``struct kvm_cpuid2`` without its entries"""

    _fields_ = [("nent", ctypes.c_uint32), ("padding", ctypes.c_uint32)]


class kvm_debugregs(ctypes.Structure):
    """``struct kvm_debugregs``"""

    _fields_ = [
        ("db", ctypes.c_uint64 * 4),
        ("dr6", ctypes.c_uint64),
        ("dr7", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("reserved", ctypes.c_uint64 * 9),
    ]


class kvm_mp_state(ctypes.Structure):
    """``struct kvm_mp_state``"""

    _fields_ = [("mp_state", ctypes.c_uint32)]


class _exception(ctypes.Structure):
    _fields_ = [
        ("injected", ctypes.c_uint8),
        ("nr", ctypes.c_uint8),
        ("has_error_code", ctypes.c_uint8),
        ("pending", ctypes.c_uint8),
        ("error_code", ctypes.c_uint32),
    ]


class _interrupt(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint8) for name in ("injected", "nr", "soft", "shadow")]


class _nmi(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint8) for name in ("injected", "pending", "masked", "pad")]


class _smi(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint8) for name in ("smm", "pending", "smm_inside_nmi", "latched_init")
    ]


class kvm_vcpu_events(ctypes.Structure):
    """``struct kvm_vcpu_events``: what is about to be delivered"""

    _fields_ = [
        ("exception", _exception),
        ("interrupt", _interrupt),
        ("nmi", _nmi),
        ("sipi_vector", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("smi", _smi),
        ("_triple_fault", ctypes.c_uint8),  # in newer headers only; reserved before
        ("_reserved", ctypes.c_uint8 * 26),
        ("exception_has_payload", ctypes.c_uint8),
        ("exception_payload", ctypes.c_uint64),
    ]


class kvm_signal_mask(ctypes.Structure):
    """``struct kvm_signal_mask``: the signals blocked during ``KVM_RUN``; the set follows"""

    _fields_ = [("len", ctypes.c_uint32)]


class kvm_userspace_memory_region(ctypes.Structure):
    """``struct kvm_userspace_memory_region``"""

    _fields_ = [
        ("slot", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("guest_phys_addr", ctypes.c_uint64),
        ("memory_size", ctypes.c_uint64),
        ("userspace_addr", ctypes.c_uint64),
    ]


class kvm_ioeventfd(ctypes.Structure):
    """``struct kvm_ioeventfd``: a guest's write that signals an eventfd in place of an exit"""

    _fields_ = [
        ("datamatch", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
        ("len", ctypes.c_uint32),
        ("fd", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint8 * 36),
    ]


class kvm_dirty_log(ctypes.Structure):
    """``struct kvm_dirty_log``; the union's other half is padding"""

    _fields_ = [
        ("slot", ctypes.c_uint32),
        ("padding1", ctypes.c_uint32),
        ("dirty_bitmap", ctypes.c_uint64),
    ]


class _io(ctypes.Structure):
    _fields_ = [
        ("direction", ctypes.c_uint8),
        ("size", ctypes.c_uint8),
        ("port", ctypes.c_uint16),
        ("count", ctypes.c_uint32),
        ("data_offset", ctypes.c_uint64),
    ]


class _mmio(ctypes.Structure):
    _fields_ = [
        ("phys_addr", ctypes.c_uint64),
        ("data", ctypes.c_uint8 * 8),
        ("len", ctypes.c_uint32),
        ("is_write", ctypes.c_uint8),
    ]


class _fail_entry(ctypes.Structure):
    _fields_ = [
        ("hardware_entry_failure_reason", ctypes.c_uint64),
        ("cpu", ctypes.c_uint32),
    ]


class _internal(ctypes.Structure):
    _fields_ = [
        ("suberror", ctypes.c_uint32),
        ("ndata", ctypes.c_uint32),
        ("data", ctypes.c_uint64 * 16),
    ]


class _exit_data(ctypes.Union):
    _fields_ = [
        ("io", _io),
        ("mmio", _mmio),
        ("fail_entry", _fail_entry),
        ("internal", _internal),
        ("_padding", ctypes.c_uint8 * 256),
    ]


class kvm_run(ctypes.Structure):
    """``struct kvm_run``: shared with the kernel, one a vCPU"""

    _anonymous_ = ("_exit",)
    _fields_ = [
        ("request_interrupt_window", ctypes.c_uint8),
        ("immediate_exit", ctypes.c_uint8),
        ("padding1", ctypes.c_uint8 * 6),
        ("exit_reason", ctypes.c_uint32),
        ("ready_for_interrupt_injection", ctypes.c_uint8),
        ("if_flag", ctypes.c_uint8),
        ("flags", ctypes.c_uint16),
        ("cr8", ctypes.c_uint64),
        ("apic_base", ctypes.c_uint64),
        ("_exit", _exit_data),
        ("kvm_valid_regs", ctypes.c_uint64),
        ("kvm_dirty_regs", ctypes.c_uint64),
        ("_sync_regs", ctypes.c_uint8 * 2048),
    ]


KVM_GET_API_VERSION = io("KVM_GET_API_VERSION", KVMIO, 0x00)
KVM_CREATE_VM = io("KVM_CREATE_VM", KVMIO, 0x01)
KVM_CHECK_EXTENSION = io("KVM_CHECK_EXTENSION", KVMIO, 0x03)
KVM_GET_VCPU_MMAP_SIZE = io("KVM_GET_VCPU_MMAP_SIZE", KVMIO, 0x04)
KVM_GET_SUPPORTED_CPUID = iowr("KVM_GET_SUPPORTED_CPUID", KVMIO, 0x05, kvm_cpuid2)
KVM_CREATE_VCPU = io("KVM_CREATE_VCPU", KVMIO, 0x41)
KVM_GET_DIRTY_LOG = iow("KVM_GET_DIRTY_LOG", KVMIO, 0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = iow(
    "KVM_SET_USER_MEMORY_REGION", KVMIO, 0x46, kvm_userspace_memory_region
)
KVM_IOEVENTFD = iow("KVM_IOEVENTFD", KVMIO, 0x79, kvm_ioeventfd)
KVM_RUN = io("KVM_RUN", KVMIO, 0x80)
KVM_GET_REGS = ior("KVM_GET_REGS", KVMIO, 0x81, kvm_regs)
KVM_SET_REGS = iow("KVM_SET_REGS", KVMIO, 0x82, kvm_regs)
KVM_GET_SREGS = ior("KVM_GET_SREGS", KVMIO, 0x83, kvm_sregs)
KVM_SET_SREGS = iow("KVM_SET_SREGS", KVMIO, 0x84, kvm_sregs)
KVM_GET_MSRS = iowr("KVM_GET_MSRS", KVMIO, 0x88, kvm_msrs)
KVM_SET_MSRS = iow("KVM_SET_MSRS", KVMIO, 0x89, kvm_msrs)
KVM_SET_CPUID2 = iow("KVM_SET_CPUID2", KVMIO, 0x90, kvm_cpuid2)
KVM_SET_SIGNAL_MASK = iow("KVM_SET_SIGNAL_MASK", KVMIO, 0x8B, kvm_signal_mask)
KVM_GET_MP_STATE = ior("KVM_GET_MP_STATE", KVMIO, 0x98, kvm_mp_state)
KVM_SET_MP_STATE = iow("KVM_SET_MP_STATE", KVMIO, 0x99, kvm_mp_state)
KVM_GET_VCPU_EVENTS = ior("KVM_GET_VCPU_EVENTS", KVMIO, 0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = iow("KVM_SET_VCPU_EVENTS", KVMIO, 0xA0, kvm_vcpu_events)
KVM_GET_DEBUGREGS = ior("KVM_GET_DEBUGREGS", KVMIO, 0xA1, kvm_debugregs)
KVM_SET_DEBUGREGS = iow("KVM_SET_DEBUGREGS", KVMIO, 0xA2, kvm_debugregs)
KVM_SET_TSC_KHZ = io("KVM_SET_TSC_KHZ", KVMIO, 0xA2)
KVM_GET_TSC_KHZ = io("KVM_GET_TSC_KHZ", KVMIO, 0xA3)
KVM_GET_XSAVE = ior("KVM_GET_XSAVE", KVMIO, 0xA4, kvm_xsave)
KVM_SET_XSAVE = iow("KVM_SET_XSAVE", KVMIO, 0xA5, kvm_xsave)
KVM_GET_XCRS = ior("KVM_GET_XCRS", KVMIO, 0xA6, kvm_xcrs)
KVM_SET_XCRS = iow("KVM_SET_XCRS", KVMIO, 0xA7, kvm_xcrs)
