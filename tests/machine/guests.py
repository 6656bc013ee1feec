"""A guest of a few instructions: it counts in memory and in RAX, and touches nothing else."""

import struct

from postcopy.machine.cpu_state import CpuState, flat_long_mode

TABLES, CODE, COUNTER, STACK = 0x1000, 0x10000, 0x20000, 0x8000
CODE_BYTES = bytes.fromhex("48ff06 48ffc0 ebf8")  # again: inc qword [rsi]; inc rax; jmp again


def pages() -> dict[int, bytes]:
    """Its memory: identity page tables for 4 MiB (everything accessed and dirty), and code."""
    tables = {TABLES: 0x2000, TABLES + PAGE: 0x3000}
    made = {at: struct.pack("<Q", to | 0x27) for at, to in tables.items()}
    made[TABLES + 2 * PAGE] = struct.pack("<QQ", 0xE7, (2 << 20) | 0xE7)
    return made | {CODE: CODE_BYTES, COUNTER: struct.pack("<Q", START)}


PAGE = 4096
START = 1000


def state(privilege: int = 3) -> CpuState:
    """Where it begins."""
    begun = flat_long_mode(rip=CODE, rsp=STACK, cr3=TABLES, privilege=privilege)
    return begun.with_regs(rsi=COUNTER, rax=START)


def counted(state: CpuState) -> int:
    """What its counter in memory must be."""
    return state.reg("rax") + (state.rip == CODE + 3)
