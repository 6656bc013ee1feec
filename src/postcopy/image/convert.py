"""Convert an image to another format; machine and devices stay as they are."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from postcopy.channel.whole_file import WholeFile
from postcopy.image.chunked import MAGIC
from postcopy.image.formats import Image
from postcopy.image.publish import never_cancelled
from postcopy.memory.runs import runs
from postcopy.stream.block_list import encode_list_end, encode_list_start
from postcopy.stream.encoder import (
    RamPart,
    description,
    device_section,
    end_of_stream,
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
from postcopy.stream.numbers import TARGET_PAGE_BYTES, SectionType
from postcopy.stream.ram_encoder import PageEncoder
from postcopy.stream.records import BlockEntry, RamSetup

_BATCH_PAGES: Final = 1024


def skeleton(image: Image) -> bytes:
    """Encode the file of an image of chunks: an image without its memory."""
    return b"".join((MAGIC, _start(image), _setup(image), _end_of_ram(image), _tail(image)))


def write_stream(
    image: Image, file: WholeFile, check: Callable[[], None] = never_cancelled
) -> None:
    """Write an image as a plain stream, zero pages included: it loads over any memory.

    :param check: called now and then; an exception of it ends the work.
    :raises OSError: the disk is full, or broken; the file is half-written.
    :raises ImageError: the image cannot be read.
    """
    at = 0
    ram = RamPart(image.ram_section_id, SectionType.END)
    begin = _start(image) + _setup(image) + ram.head
    for part in itertools.chain((begin,), _records(image, check), (ram.tail + _tail(image),)):
        file.write_at(at, part)
        at += len(part)


def write_mapped(
    image: Image, file: WholeFile, check: Callable[[], None] = never_cancelled
) -> None:
    """Write an image as a mapped-ram file, sparse.

    :param check: called now and then; an exception of it ends the work.
    :raises OSError: the disk is full, or broken; the file is half-written.
    :raises ImageError: the image cannot be read.
    """
    head = _start(image, CAPABILITY) + encode_list_start(image.ram_section_id, image.ram_bytes)
    blocks, end = lay_out([(each.name, each.size_bytes) for each in image.blocks], len(head))
    file.write_at(0, head)
    for block in blocks:
        _write_block(file, image, block, check)
    end_of_list = encode_list_end(image.ram_section_id)
    file.write_at(end, end_of_list + _end_of_ram(image) + _tail(image))


def _start(image: Image, *capabilities: str) -> bytes:
    """Encode everything in front of the memory."""
    early = image.sections[: image.early_sections]
    configuration = replace(image.configuration, capabilities=capabilities)
    return stream_start(configuration) + b"".join(map(device_section, early))


def _setup(image: Image) -> bytes:
    entries = tuple(BlockEntry(block.name, block.size_bytes) for block in image.blocks)
    return ram_setup(RamSetup(image.ram_section_id, entries), postcopy=False)


def _records(image: Image, check: Callable[[], None]) -> Iterator[bytes]:
    """Encode all pages, in batches."""
    encoder = PageEncoder(_BATCH_PAGES)
    for block in image.blocks:
        has_data = image.has_data(block.name)
        for start in range(0, block.pages, _BATCH_PAGES):
            check()
            count = min(_BATCH_PAGES, block.pages - start)
            offsets = np.arange(start, start + count, dtype=np.uint64) * np.uint64(
                TARGET_PAGE_BYTES
            )
            if has_data[start : start + count].any():
                rows = image.read(block.name, start, count)
                data, zero = encoder.nonzero_copies(block.name, offsets, rows)
                yield bytes(data)
                offsets = offsets[zero]
            if len(offsets):
                yield encoder.zeros(block.name, offsets)


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


def _end_of_ram(image: Image) -> bytes:
    return RamPart(image.ram_section_id, SectionType.END).around()


def _tail(image: Image) -> bytes:
    """Encode everything behind the memory."""
    end = image.device_bytes() + end_of_stream()
    return end if image.description is None else end + description(image.description)
