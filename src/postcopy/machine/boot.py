"""How a machine begins: no firmware, just memory prepared and registers set.

What the machine puts into guest memory before the image runs::

    0x0500  GDT: null, kernel code 0x08, kernel data 0x10, user data 0x18, user code 0x20
    0x1000  PML4, 0x2000 PDPT, 0x3000-0x6fff page directories of the first 4 GiB: 2 MiB pages
    0x7000  with a drive: the page directory of the GiB of devices
    0x8000  stacks, 512 bytes for each vCPU, number 0 on top (at 0x10000)
    0x10000 the image, unless told otherwise
    0x100000 the other page directories, one for each GiB, where there is more memory than 4 GiB

A guest finds its RAM in one piece from address 0 on, block behind block.  That is the
identity but on ``microvm`` from 3 GiB on, whose RAM goes on at physical 4 GiB.  Pages of 1 GiB would
need no further directories, but not every KVM has them (one without hardware's second level of page
tables need not), and a guest that moves would be lost there.

With a drive, the GiB of devices below physical 4 GiB is found at :data:`DEVICES_ADDRESS`, however
large the memory is.

Every table entry has its accessed and dirty bits set already, and every descriptor its accessed
bit, so the processor never writes there: memory changes only where the guest's own code writes.
Addresses beyond the RAM are not mapped: touching one ends the guest.  (Intel SDM volume 3, 4.5.)
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from postcopy.errors import Refused
from postcopy.kernel.mapping import Mapping
from postcopy.machine.address_map import AddressMap
from postcopy.machine.cpu_state import CpuState, DescriptorTable, flat_long_mode

if TYPE_CHECKING:
    from postcopy.machine.config import MachineConfig
    from postcopy.machine.vcpu import Vcpu

GDT_ADDRESS = 0x500
PML4_ADDRESS = 0x1000
PDPT_ADDRESS = 0x2000
DIRECTORIES_ADDRESS = 0x3000
RESERVED_END = 0x7000
"""Below this address everything is the machine's."""

FAR_DIRECTORIES_ADDRESS = 0x100000
"""Not lower: there QEMU's microvm shows its firmware in place of RAM."""

DEVICES_DIRECTORY_ADDRESS = 0x7000

DEVICES_ADDRESS = 511 << 30
"""Where the guest finds physical 3 GiB and what follows, up to 4 GiB; beyond any memory."""

DEVICES_PHYSICAL_ADDRESS = 3 << 30

STACKS_TOP = 0x10000
STACK_BYTES = 512

_PRESENT, _WRITABLE, _USER, _ACCESSED, _DIRTY, _LARGE = 1, 2, 4, 0x20, 0x40, 0x80
_TABLE = _PRESENT | _WRITABLE | _USER | _ACCESSED
_PAGE = _TABLE | _DIRTY | _LARGE
_LARGE_PAGE_BYTES = 2 << 20
_TABLE_BYTES = 4096
_TABLE_WORDS = 512
_NEAR_DIRECTORIES = (RESERVED_END - DIRECTORIES_ADDRESS) // _TABLE_BYTES

_GDT = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
_SELECTORS = {0: (0x08, 0x10), 3: (0x23, 0x1B)}


def reserved(memory_bytes: int, *, drive: bool = False) -> list[tuple[int, int]]:
    """The ranges of guest addresses that are the machine's, where no image may lie."""
    far = _directories(memory_bytes) - _NEAR_DIRECTORIES
    ranges = [(0, DEVICES_DIRECTORY_ADDRESS + _TABLE_BYTES if drive else RESERVED_END)]
    if far > 0:
        ranges.append((FAR_DIRECTORIES_ADDRESS, FAR_DIRECTORIES_ADDRESS + far * _TABLE_BYTES))
    return ranges


def prepare_memory(
    ram: Mapping,
    addresses: AddressMap,
    image: bytes | None,
    load_address: int,
    *,
    drive: bool = False,
) -> None:
    """Write the tables and the image into memory that is all zeros."""
    ram.write(GDT_ADDRESS, _words(_GDT))
    for address, table in page_tables(addresses):
        ram.write(address, table)
    if drive:
        _map_devices(ram)
    if image is not None:
        ram.write(load_address, image)


def page_tables(addresses: AddressMap) -> Iterator[tuple[int, bytes]]:
    """The tables that map all RAM in one piece from 0 on, each with the address it belongs at."""
    entries = array("Q")
    for part in addresses.parts:
        entries.extend(range(part.guest_address | _PAGE, part.end_address, _LARGE_PAGE_BYTES))
    places = [_directory_address(n) for n in range(-(-len(entries) // _TABLE_WORDS))]
    yield PML4_ADDRESS, _words([PDPT_ADDRESS | _TABLE])
    yield PDPT_ADDRESS, _words([place | _TABLE for place in places])
    for number, place in enumerate(places):
        yield place, entries[number * _TABLE_WORDS : (number + 1) * _TABLE_WORDS].tobytes()


def _map_devices(ram: Mapping) -> None:
    first = DEVICES_PHYSICAL_ADDRESS | _PAGE
    pages = range(first, first + _TABLE_WORDS * _LARGE_PAGE_BYTES, _LARGE_PAGE_BYTES)
    ram.write(DEVICES_DIRECTORY_ADDRESS, _words(pages))
    entry = PDPT_ADDRESS + 8 * (DEVICES_ADDRESS >> 30)
    ram.write(entry, _words([DEVICES_DIRECTORY_ADDRESS | _TABLE]))


def _directories(memory_bytes: int) -> int:
    return -(-memory_bytes // (_TABLE_WORDS * _LARGE_PAGE_BYTES))


def _directory_address(number: int) -> int:
    far = number - _NEAR_DIRECTORIES
    start = DIRECTORIES_ADDRESS if far < 0 else FAR_DIRECTORIES_ADDRESS
    return start + (number if far < 0 else far) * _TABLE_BYTES


def _words(values: Iterable[int]) -> bytes:
    return array("Q", values).tobytes()


def boot_guest(
    config: "MachineConfig", ram: Mapping, addresses: AddressMap, vcpus: "Iterable[Vcpu]"
) -> None:
    """Make memory and vCPUs ready for the first instruction of the image.

    :raises Refused: there is no image.
    """
    if config.image is None:
        raise Refused("a machine without an image has nothing to boot; give an image")
    drive = config.has_device
    prepare_memory(ram, addresses, config.image, config.load_address, drive=drive)
    for vcpu in vcpus:
        vcpu.set_state(
            boot_state(
                index=vcpu.index,
                memory_bytes=config.memory_bytes,
                entry=config.entry,
                privilege=config.privilege,
            )
        )


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
