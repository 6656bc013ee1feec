"""Where the RAM blocks of a PC lie in the guest's physical memory.

A PC maps one RAM block twice: below 4 GiB up to where the PCI devices begin, and the rest from 4 GiB on.  A
part of the first MiB is firmware, or RAM that the firmware has copied itself to, as the host bridge says.
The sizes of the two parts are in the CMOS memory of the clock, where the firmware finds them; without one,
they follow from the machine type and the size.

Source: QEMU's ``hw/i386/pc_q35.c``, ``pc_piix.c`` and ``microvm.c`` for the sizes; the data sheets of the
82441FX and the 82G33 for the registers that map RAM over the firmware (PAM).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from postcopy.image.base import Image, ImageBlock
from postcopy.image.device_fields import device_fields
from postcopy.stream.described_state import flatten

_KIB: Final = 1 << 10
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_FOUR_GIB: Final = 4 * _GIB

_DEVICES_AT: Final = 0xA0000  # the frame buffer of a VGA
_ROMS_AT: Final = 0xC0000
_FIRMWARE_BYTES: Final = 128 * _KIB  # of it, so much is below 1 MiB
_SEGMENT_BYTES: Final = 16 * _KIB

_RAM_NAMES: Final = ("pc.ram", "microvm.ram")
_NODE: Final = re.compile(r"(?:/objects/)?(?:ram-node|mem|ram|dimm)?(\d+)")
_CMOS: Final = "mc146818rtc"
_BRIDGES: Final = {"/mch": 0x90, "/I440FX": 0x59}
"""How the name of a host bridge ends, and where its PAM registers are."""


@dataclass(frozen=True, slots=True)
class PhysicalRange:
    """A part of a block, and the physical address at which the guest has it; all in bytes."""

    address: int
    length_bytes: int
    block: ImageBlock
    block_offset: int = 0

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + self.length_bytes


@dataclass(frozen=True, slots=True)
class _Board:
    """What the image says of the guest's board.

    :ivar sizes: of the RAM below and above 4 GiB, as the CMOS has them.
    :ivar pam: the seven registers that map RAM over the firmware.
    """

    sizes: tuple[int, int] | None = None
    pam: bytes | None = None


def physical_ranges(image: Image) -> list[PhysicalRange] | None:
    """Lay out the RAM of an image as the guest sees it, in ascending order, without overlaps.

    Memory of devices, such as a frame buffer, is not in it.

    :return: ``None`` for a machine whose layout is not known here, or whose blocks of RAM cannot be told
        from its other blocks.
    :raises ImageError: the state of a device is not as the image describes it.
    """
    machine = image.machine_name
    if not machine.startswith(("pc-", "microvm")):
        return None
    board = _board(image)
    blocks = _ram_blocks(image, sum(board.sizes or ()))
    if not blocks:
        return None
    total = sum(block.size_bytes for block in blocks)
    below, above = board.sizes or (0, 0)
    if below + above != total:
        below = _below(machine, total)
    ranges = list(_split(blocks, below))
    covers = _microvm_firmware(image) if machine == "microvm" else _low_memory(image, board.pam)
    for start, end, block, offset in covers:
        ranges = list(_cover(ranges, start, end))
        if block is not None:
            ranges.append(PhysicalRange(start, end - start, block, offset))
    return sorted(ranges, key=lambda each: each.address)


def _ram_blocks(image: Image, total_bytes: int) -> list[ImageBlock]:
    """Find the blocks that are the guest's RAM, in the order of their addresses.

    :param total_bytes: of all RAM, if it is known: users name the blocks as they like.
    """
    for block in image.blocks:
        if block.name in _RAM_NAMES or block.size_bytes == total_bytes:
            return [block]
    nodes = [
        (int(found[1]), block)
        for block in image.blocks
        if (found := _NODE.fullmatch(block.name)) is not None
    ]
    return [block for _, block in sorted(nodes, key=lambda node: node[0])]


def _board(image: Image) -> _Board:
    sizes = pam = None
    for device in device_fields(image):
        name = device.section.name
        if name == _CMOS:
            sizes = _cmos_sizes(device.fields.get("cmos_data"))
        for suffix, at in _BRIDGES.items():
            if name.endswith(suffix):
                configs = [v for path, v in flatten(device.fields) if "config" in path]
                if configs and isinstance(configs[0], str):
                    pam = bytes.fromhex(configs[0])[at : at + 7]
    return _Board(sizes, pam)


def _cmos_sizes(data: object) -> tuple[int, int] | None:
    """Read the sizes below and above 4 GiB."""
    cmos = bytes.fromhex(data) if isinstance(data, str) else b""
    if len(cmos) < 0x5E:
        return None
    above_16 = int.from_bytes(cmos[0x34:0x36], "little") * 64 * _KIB
    above_1 = int.from_bytes(cmos[0x30:0x32], "little") * _KIB
    below = 16 * _MIB + above_16 if above_16 else _MIB + above_1
    return below, int.from_bytes(cmos[0x5B:0x5E], "little") * 64 * _KIB


def _below(machine: str, total: int) -> int:
    """Return the bytes below 4 GiB by default."""
    if "q35" in machine:
        limit = 2 * _GIB if total >= 0xB0000000 else 0xB0000000
    elif machine == "microvm":
        limit = 3 * _GIB
    else:
        limit = 3 * _GIB if total >= 0xE0000000 else 0xE0000000
    return min(limit, total)


def _split(blocks: list[ImageBlock], below: int) -> Iterator[PhysicalRange]:
    at = 0  # in the RAM, whose blocks follow one another
    for block in blocks:
        end = at + block.size_bytes
        if at < below:
            yield PhysicalRange(at, min(end, below) - at, block)
        if end > below:
            start = max(at, below)
            yield PhysicalRange(start - below + _FOUR_GIB, end - start, block, start - at)
        at = end


_Cover = tuple[int, int, ImageBlock | None, int]
"""Start and end of a range of addresses; the block that is there instead of RAM, or no RAM at all; and the
offset in it."""


def _named(image: Image, name: str) -> ImageBlock | None:
    return next((block for block in image.blocks if block.name == name), None)


def _microvm_firmware(image: Image) -> Iterator[_Cover]:
    bios = _named(image, "pc.bios")
    if bios is not None:
        size = min(bios.size_bytes, _FIRMWARE_BYTES)
        yield _MIB - size, _MIB, bios, bios.size_bytes - size


def _low_memory(image: Image, pam: bytes | None) -> Iterator[_Cover]:
    """Say what is in the place of RAM from 640 KiB to 1 MiB."""
    if any("vga" in block.name for block in image.blocks):
        yield _DEVICES_AT, _ROMS_AT, None, 0
    rom, bios = _named(image, "pc.rom"), _named(image, "pc.bios")
    for address in range(_ROMS_AT, _MIB, _SEGMENT_BYTES):
        if pam is None or _reads_ram(pam, address):
            continue
        end = address + _SEGMENT_BYTES
        if bios is not None and _MIB - address <= min(bios.size_bytes, _FIRMWARE_BYTES):
            yield address, end, bios, bios.size_bytes - (_MIB - address)
        elif rom is not None and end - _ROMS_AT <= rom.size_bytes:
            yield address, end, rom, address - _ROMS_AT


def _reads_ram(pam: bytes, address: int) -> bool:
    """Tell whether a read of a segment gets RAM: of its bits, bit 0 says so."""
    if address >= 0xF0000:  # one segment of 64 KiB
        return bool(pam[0] >> 4 & 1)
    number = (address - _ROMS_AT) // _SEGMENT_BYTES
    return bool(pam[1 + number // 2] >> (4 * (number % 2)) & 1)


def _cover(ranges: list[PhysicalRange], start: int, end: int) -> Iterator[PhysicalRange]:
    """Leave out what lies from ``start`` to ``end``."""
    for each in ranges:
        if each.end <= start or end <= each.address:
            yield each
            continue
        if each.address < start:
            yield PhysicalRange(each.address, start - each.address, each.block, each.block_offset)
        if end < each.end:
            skipped = end - each.address
            yield PhysicalRange(end, each.end - end, each.block, each.block_offset + skipped)
