"""Sections beside the vCPUs': clock, run state, serial port, and those that are accepted and dropped.

A QEMU ``microvm`` also sends its firmware configuration, interrupt controllers and paravirtual
clock.  Our machine has none of these, but the stream must be read past them, so their formats are
here too; :data:`IGNORED` says which.
"""

from postcopy.machine import virtio_section
from postcopy.machine.cpu_formats import CPU, CPU_COMMON
from postcopy.stream.format_table import FormatTable
from postcopy.stream.vmstate import (
    BOOL,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Field,
    Format,
    Structure,
    buffer,
    pad,
)

TIMER = Format(
    "timer",
    2,
    (Field("cpu_ticks_offset", I64), Field("unused", pad(8)), Field("cpu_clock_offset", I64)),
    minimum_version=1,
)
"""The virtual machine's clocks where it was stopped: TSC ticks and nanoseconds."""

GLOBALSTATE = Format(
    "globalstate",
    1,
    (
        Field("size", U32),
        Field("runstate", buffer(32)),
        Field("has_vm_was_suspended", U8),
        Field("vm_was_suspended", U8),
        Field("unused", buffer(66)),
    ),
    minimum_version=1,
)

SERIAL_REGISTERS = Structure(
    "serial",
    (
        Field("divider", U16),
        *(Field(name, U8) for name in ("rbr", "ier", "iir", "lcr", "mcr", "lsr", "msr", "scr")),
        Field("fcr_vmstate", U8),
    ),
    version=3,
)

SERIAL_FIFO = Structure("Fifo8", (Field("data", buffer(16)), Field("head", U32), Field("num", U32)))

SERIAL = Format(
    "serial",
    3,
    (Field("state", SERIAL_REGISTERS),),
    (
        Format("serial/thr_ipending", 1, (Field("thr_ipending", I32),)),
        Format("serial/tsr", 1, (Field("tsr_retry", U32), Field("thr", U8), Field("tsr", U8))),
        Format("serial/recv_fifo", 1, (Field("recv_fifo", SERIAL_FIFO),)),
        Format("serial/xmit_fifo", 1, (Field("xmit_fifo", SERIAL_FIFO),)),
        Format("serial/fifo_timeout_timer", 1, (Field("fifo_timeout_timer", I64),)),
        Format("serial/timeout_ipending", 1, (Field("timeout_ipending", I32),)),
        Format("serial/poll", 1, (Field("poll_msl", I32), Field("modem_status_poll", I64))),
    ),
    minimum_version=2,
)
"""QEMU's own format of a 16550 at port 0x3f8, so that a microvm with ``isa-serial=on`` takes it."""

FW_CFG = Format(
    "fw_cfg",
    2,
    (Field("cur_entry", U16), Field("cur_offset[1]", U32)),
    (Format("fw_cfg/dma", 0, (Field("dma_addr", U64),)),),
    minimum_version=1,
)

_HANDLERS = Structure(
    "kvmvapic-handlers",
    (
        Field("set_tpr", U32),
        Field("set_tpr_eax", U32),
        Field("get_tpr", U32, 8),
        Field("get_tpr_stack", U32),
    ),
)
_VAPIC_ROM = Structure(
    "kvmvapic-guest-rom",
    (
        Field("unused", pad(8)),
        *(Field(name, U32) for name in ("vaddr", "fixup_start", "fixup_end", "vapic_vaddr")),
        *(Field(name, U32) for name in ("vapic_size", "vcpu_shift", "real_tpr_addr")),
        Field("up", _HANDLERS),
        Field("mp", _HANDLERS),
    ),
)
KVM_TPR_OPT = Format(
    "kvm-tpr-opt",
    1,
    (
        Field("rom_state", _VAPIC_ROM),
        *(Field(name, U32) for name in ("state", "real_tpr_addr", "rom_state_vaddr")),
        *(Field(name, U32) for name in ("vapic_paddr", "rom_state_paddr")),
    ),
    minimum_version=1,
)

APIC = Format(
    "apic",
    3,
    (
        Field("apicbase", U32),
        *(Field(name, U8) for name in ("id", "arb_id", "tpr")),
        Field("spurious_vec", U32),
        *(Field(name, U8) for name in ("log_dest", "dest_mode")),
        *(Field(name, U32, 8) for name in ("isr", "tmr", "irr")),
        Field("lvt", U32, 6),
        Field("esr", U32),
        Field("icr", U32, 2),
        Field("divide_conf", U32),
        Field("count_shift", I32),
        Field("initial_count", U32),
        *(Field(name, I64) for name in ("initial_count_load_time", "next_time", "timer_expiry")),
    ),
    (Format("apic_sipi", 1, (Field("sipi_vector", I32), Field("wait_for_sipi", I32))),),
    minimum_version=3,
)

IOAPIC = Format(
    "ioapic",
    3,
    (
        *(Field(name, U8) for name in ("id", "ioregsel")),
        Field("unused", pad(8)),
        Field("irr", U32),
        Field("ioredtbl", U64, 24),
    ),
    minimum_version=3,
)

KVMCLOCK = Format(
    "kvmclock",
    1,
    (Field("clock", U64),),
    (Format("kvmclock/clock_is_reliable", 1, (Field("clock_is_reliable", BOOL),)),),
    minimum_version=1,
)

IGNORED = (FW_CFG, KVM_TPR_OPT, APIC, IOAPIC, KVMCLOCK)
"""Read and dropped: devices of a microvm that our machine does without."""

_DRIVES = virtio_section.FORMATS.values()

FORMATS = FormatTable(
    (TIMER, SERIAL, *_DRIVES, GLOBALSTATE, FW_CFG, KVM_TPR_OPT, IOAPIC, KVMCLOCK),
    per_cpu=(CPU_COMMON, CPU, APIC),
)
"""Every section that may come to our machine."""
