"""How a machine begins: no firmware, just memory prepared and registers set.

What the machine puts into guest memory before the image runs::

    0x0500  GDT: null, kernel code 0x08, kernel data 0x10, user data 0x18, user code 0x20
    0x1000  PML4, 0x2000 PDPT, 0x3000-0x6fff page directories: identity, 2 MiB pages, all of RAM
    0x8000  stacks, 512 bytes for each vCPU, number 0 on top (at 0x10000)
    0x10000 the image, unless told otherwise

Every table entry has its accessed and dirty bits set already, and every descriptor its accessed
bit, so the processor never writes there: memory changes only where the guest's own code writes.
Addresses beyond the RAM are not mapped: touching one ends the guest.  (Intel SDM volume 3, 4.5.)
"""

from dataclasses import replace

import numpy as np

from postcopy.kernel.mapping import Mapping
from postcopy.machine.cpu_state import CpuState, DescriptorTable, flat_long_mode

GDT_ADDRESS = 0x500
PML4_ADDRESS = 0x1000
PDPT_ADDRESS = 0x2000
DIRECTORIES_ADDRESS = 0x3000
RESERVED_END = 0x7000
"""Below this address everything is the machine's."""

STACKS_TOP = 0x10000
STACK_BYTES = 512

_PRESENT, _WRITABLE, _USER, _ACCESSED, _DIRTY, _LARGE = 1, 2, 4, 0x20, 0x40, 0x80
_TABLE = _PRESENT | _WRITABLE | _USER | _ACCESSED
_PAGE = _TABLE | _DIRTY | _LARGE
_LARGE_PAGE_BYTES = 2 << 20

_GDT = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
_SELECTORS = {0: (0x08, 0x10), 3: (0x23, 0x1B)}


def prepare_memory(ram: Mapping, image: bytes | None, load_address: int) -> None:
    """Write the tables and the image into memory that is all zeros."""
    ram.write(GDT_ADDRESS, np.array(_GDT, dtype="<u8").tobytes())
    ram.write(PML4_ADDRESS, page_tables(ram.length))
    if image is not None:
        ram.write(load_address, image)


def page_tables(memory_bytes: int) -> bytes:
    """The bytes from ``PML4_ADDRESS`` on that map ``memory_bytes`` to themselves."""
    pages = memory_bytes // _LARGE_PAGE_BYTES
    directories = -(-pages // 512)
    words = np.zeros((DIRECTORIES_ADDRESS - PML4_ADDRESS) // 8 + directories * 512, dtype="<u8")
    words[0] = PDPT_ADDRESS | _TABLE
    words[512 : 512 + directories] = (
        DIRECTORIES_ADDRESS + 4096 * np.arange(directories, dtype="<u8")
    ) | np.uint64(_TABLE)
    words[1024 : 1024 + pages] = np.arange(pages, dtype="<u8") * np.uint64(
        _LARGE_PAGE_BYTES
    ) | np.uint64(_PAGE)
    return words.tobytes()


def boot_state(*, index: int, memory_bytes: int, entry: int, privilege: int) -> CpuState:
    """The first state of a vCPU, the same for every accelerator.

    The selectors are those of the GDT above, so a guest may load them again.
    """
    stack = STACKS_TOP - index * STACK_BYTES
    state = flat_long_mode(rip=entry, rsp=stack, cr3=PML4_ADDRESS, privilege=privilege)
    code, data = _SELECTORS[privilege]
    flat = replace(state.ds, selector=data)
    state = replace(state, es=flat, ss=flat, ds=flat, fs=flat, gs=flat)
    state = replace(
        state,
        cs=replace(state.cs, selector=code),
        gdt=DescriptorTable(GDT_ADDRESS, len(_GDT) * 8 - 1),
        idt=DescriptorTable(0, 0),
    )
    return state.with_regs(rdi=index, rsi=memory_bytes)
