"""Convert an image to another format; machine and devices stay as they are."""

import struct
from collections.abc import Callable
from typing import Final

from postcopy.channel.whole_file import WholeFile
from postcopy.image.chunked import MAGIC
from postcopy.image.formats import Image
from postcopy.image.publish import never_cancelled
from postcopy.memory.runs import runs
from postcopy.stream.configuration import encode_name
from postcopy.stream.encoder import (
    RamPart,
    description,
    device_section,
    end_of_stream,
    footer,
    ram_setup,
    stream_start,
)
from postcopy.stream.mapped_ram import (
    CAPABILITY,
    MappedBlock,
    encode_bitmap,
    encode_entry,
    lay_out,
)
from postcopy.stream.numbers import (
    RAM_SECTION_NAME,
    RAM_SECTION_VERSION,
    TARGET_PAGE_BYTES,
    RamFlag,
    SectionType,
)
from postcopy.stream.records import BlockEntry, Configuration, DeviceSection, RamSetup

_RAM_ID: Final = 1
_BATCH_PAGES: Final = 1024


def skeleton(image: Image) -> bytes:
    """Encode the file of an image of chunks: an image without its memory."""
    entries = tuple(BlockEntry(block.name, block.size_bytes) for block in image.blocks)
    return b"".join(
        (
            MAGIC,
            stream_start(Configuration(image.machine_name, uuid=image.uuid)),
            ram_setup(RamSetup(_RAM_ID, entries), postcopy=False),
            _tail(image),
        )
    )


def write_mapped(
    image: Image, file: WholeFile, check: Callable[[], None] = never_cancelled
) -> None:
    """Write an image as a mapped-ram file, sparse.

    :param check: called now and then; an exception of it ends the work.
    :raises OSError: the disk is full, or broken; the file is half-written.
    :raises ImageError: the image cannot be read.
    """
    head = _mapped_head(image)
    blocks, end = lay_out([(each.name, each.size_bytes) for each in image.blocks], len(head))
    file.write_at(0, head)
    for block in blocks:
        _write_block(file, image, block, check)
    eos = struct.pack(">Q", RamFlag.EOS) + footer(_RAM_ID)
    file.write_at(end, eos + _tail(image))


def _mapped_head(image: Image) -> bytes:
    capabilities = (CAPABILITY,)
    start = stream_start(Configuration(image.machine_name, None, capabilities, image.uuid))
    total = image.ram_bytes | RamFlag.MEM_SIZE
    section = struct.pack(">BI", SectionType.START, _RAM_ID) + encode_name(RAM_SECTION_NAME)
    return start + section + struct.pack(">IIQ", 0, RAM_SECTION_VERSION, total)


def _write_block(
    file: WholeFile, image: Image, block: MappedBlock, check: Callable[[], None]
) -> None:
    entry = encode_entry(block)
    file.write_at(block.bitmap_offset - len(entry), entry)
    present = image.has_data(block.name).copy()
    for first, end in runs(present).tolist():
        for start in range(first, end, _BATCH_PAGES):
            check()
            rows = image.read(block.name, start, min(_BATCH_PAGES, end - start))
            present[start : start + len(rows)] = rows.any(axis=1)
            file.write_at(block.pages_offset + start * TARGET_PAGE_BYTES, rows.data)
    file.write_at(block.bitmap_offset, encode_bitmap(present))


def _tail(image: Image) -> bytes:
    sections = [
        device_section(DeviceSection(number, each.name, each.instance, each.version, each.payload))
        for number, each in enumerate(image.devices, _RAM_ID + 1)
    ]
    end = RamPart(_RAM_ID, SectionType.END).around() + b"".join(sections) + end_of_stream()
    return end if image.description is None else end + description(image.description)
