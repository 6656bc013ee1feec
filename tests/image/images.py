"""Images for tests, written out piece by piece so that each of them can be wrong."""

import contextlib
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from postcopy.image.finalize import FinalizedImage, finalize, make_manifest
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest, Times
from postcopy.image.options import ImageOptions, SnapshotTimings
from postcopy.image.publish import reserved
from postcopy.machine.sections import descriptions, encode_devices
from postcopy.stream.description import build_description
from postcopy.stream.encoder import (
    RamPart,
    description,
    device_section,
    end_of_stream,
    footer,
    ram_setup,
    stream_start,
)
from postcopy.stream.mapped_ram import encode_bitmap, encode_entry, lay_out
from postcopy.stream.numbers import SectionType
from postcopy.stream.ram_encoder import PageEncoder
from postcopy.stream.records import BlockEntry, Configuration, DeviceSection, RamSetup

PAGE = 4096
RAM_ID = 2
TIMES = Times("2026-11-22T06:00:00.000+00:00", pause_us=900, total_ms=12)

Memory = Mapping[str, np.ndarray]
"""Block: its pages, shape ``(pages, 4096)``."""


def memory(pages: int = 48, rom_pages: int = 4, *, seed: int = 1) -> dict[str, np.ndarray]:
    """Two blocks; about half of the pages have data, in runs and one by one."""
    random = np.random.default_rng(seed)
    blocks = {}
    for name, count in (("ram", pages), ("rom", rom_pages)):
        rows = random.integers(0, 256, (count, PAGE), dtype=np.uint8)
        rows[np.repeat(random.random(-(-count // 4)) < 0.3, 4)[:count]] = 0
        rows[random.random(count) < 0.2] = 0
        blocks[name] = rows
    return blocks


def devices() -> list:
    """A machine without vCPUs has a clock and a run state."""
    return encode_devices([])


def _head(capabilities: tuple[str, ...] = ()) -> bytes:
    return stream_start(Configuration("microvm", capabilities=capabilities))


def _tail(*, described: bool) -> bytes:
    states = devices()
    sections = [
        device_section(DeviceSection(number, each.name, each.instance, each.version, each.payload))
        for number, each in enumerate(states, RAM_ID + 1)
    ]
    end = b"".join(sections) + end_of_stream()
    if not described:
        return end
    return end + description(build_description(Configuration("microvm"), descriptions(states)))


def early_section() -> bytes:
    """A section as it may stand in front of the memory."""
    state = devices()[0]
    return device_section(DeviceSection(1, state.name, 0, state.version, state.payload))


def stream_bytes(
    blocks: Memory,
    *,
    described: bool = True,
    repeats: bool = False,
    begin: bytes = b"",
    page_sizes: Mapping[str, int] | None = None,
) -> bytes:
    """A plain stream.

    :param repeats: every page is sent with other contents first.
    :param begin: what stands in front of the memory.
    :param page_sizes: of blocks of huge pages.
    """
    sizes = page_sizes or {}
    entries = tuple(BlockEntry(name, rows.size, sizes.get(name)) for name, rows in blocks.items())
    parts = [_head(), begin, ram_setup(RamSetup(RAM_ID, entries), postcopy=bool(sizes))]
    encoder = PageEncoder()
    if repeats:
        stale = {name: np.roll(rows, 1, 0) + np.uint8(1) for name, rows in blocks.items()}
        parts.append(_part(encoder, stale, SectionType.PART))
    parts.append(_part(encoder, blocks, SectionType.END))
    return b"".join((*parts, _tail(described=described)))


def _part(encoder: PageEncoder, blocks: Memory, kind: SectionType) -> bytes:
    records = []
    for name, rows in blocks.items():
        for start in range(0, len(rows), 8):
            some = np.arange(start, min(start + 8, len(rows)), dtype=np.uint64) * np.uint64(PAGE)
            data, zero = encoder.nonzero_pages(name, some, rows)
            records.append(bytes(data))
            if zero.any():
                records.append(encoder.zeros(name, some[zero]))
    return RamPart(RAM_ID, kind).around(*records)


def write_mapped(path: Path, blocks: Memory) -> None:
    """A mapped-ram file, sparse."""
    head = _head(("mapped-ram",))
    total = sum(rows.size for rows in blocks.values())
    head += struct.pack(">BIB3sIIQ", 1, RAM_ID, 3, b"ram", 0, 4, total | 4)
    mapped, end = lay_out([(name, rows.size) for name, rows in blocks.items()], len(head))
    with path.open("wb") as file:
        file.write(head)
        for block in mapped:
            rows = blocks[block.name]
            present = rows.any(axis=1)
            file.seek(block.header_offset - len(block.name) - 9)
            file.write(encode_entry(block))
            file.seek(block.bitmap_offset)
            file.write(encode_bitmap(present))
            for page in np.flatnonzero(present).tolist():
                file.seek(block.pages_offset + page * PAGE)
                file.write(rows[page].tobytes())
        file.seek(end)
        file.write(struct.pack(">Q", 0x10) + footer(RAM_ID))
        file.write(RamPart(RAM_ID).around() * 3 + RamPart(RAM_ID, SectionType.END).around())
        file.write(_tail(described=True))


def write_image(path: Path, form: str, blocks: Memory) -> Path:
    """An image of either format."""
    if form == "stream":
        path.write_bytes(stream_bytes(blocks))
    else:
        write_mapped(path, blocks)
    return path


def take_image(
    path: Path, form: str, blocks: Memory, *, compressed: bool = False, parent: Path | None = None
) -> FinalizedImage:
    """An image as ``postcopy snapshot`` makes it of what a machine has written."""
    with reserved(path) as written:
        write_image(written, form, blocks)
        return finalize(
            path, written, ImageOptions("mapped-ram", compressed, parent), SnapshotTimings(0.0)
        )


def write_manifest(path: Path) -> Manifest:
    """The manifest of an image that is whole."""
    with open_image(path) as image:
        manifest = make_manifest(image, TIMES)
    manifest.save(path)
    return manifest


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file; doing it twice undoes it."""
    with path.open("r+b", buffering=0) as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def open_below(folder: Path) -> list[str]:
    """The files in a folder that this process has open."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found.append(each.readlink())
    return [str(each) for each in found if each.is_relative_to(folder)]
