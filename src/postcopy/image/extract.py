"""Write the memory of an image to a plain file, byte for byte; zeros become holes.

Either one block, or the guest's physical memory, each byte at its address.
"""

import os
from collections.abc import Iterator, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Final

import numpy as np

from postcopy.channel.path_lock import path_locked
from postcopy.channel.whole_file import Place, WholeFile
from postcopy.errors import Refused
from postcopy.image.base import PageRows
from postcopy.image.file_kinds import look_at_target
from postcopy.image.formats import Image
from postcopy.image.physical import PhysicalRange, physical_ranges
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Mask, runs

_BATCH_PAGES: Final = 1024


def choose_ranges(image: Image, name: str | None) -> list[PhysicalRange]:
    """Find a block by its name; without one, the physical memory, or else the largest block.

    :raises Refused: there is no such block.
    :raises ImageError: the state of a device is not as the image describes it.
    """
    if name is None:
        if (ranges := physical_ranges(image)) is not None:
            return ranges
        name = max(image.blocks, key=lambda block: block.size_bytes).name
    for block in image.blocks:
        if block.name == name:
            return [PhysicalRange(0, block.size_bytes, block)]
    names = ", ".join(block.name for block in image.blocks)
    raise Refused(f"{image.path} has no block '{name}'; it has {names}")


def extract(image: Image, ranges: Sequence[PhysicalRange], path: Path) -> int:
    """Write memory to a file, which replaces an existing one, or into a FIFO or a device.

    :param ranges: what to write, each to the offset that is its address; ascending.
    :return: the bytes of data; the rest are holes, or zeros where there can be no holes.
    :raises Refused: the existing file must not be replaced, or another process writes there.
    :raises OSError: the disk is full, or broken; no file has got the name.
    :raises ImageError: the image cannot be read.
    """
    try:
        if path.exists() and path.samefile(image.path):
            raise Refused(f"{path} is the image itself; give another path for its memory")
        if look_at_target(path) is Place.DEVICE:
            return _pour(image, ranges, path)
        with path_locked(path), WholeFile(path) as file:
            os.ftruncate(file.fd, max(each.end for each in ranges))
            data = sum(_write(file, image, each) for each in ranges)
            file.publish()
        return data
    except OSError as failure:  # it may name the lock file, or no file
        raise OSError(failure.errno, failure.strerror, str(path)) from failure


def _write(file: WholeFile, image: Image, of: PhysicalRange) -> int:
    first = of.block_offset // TARGET_PAGE_BYTES
    wanted = image.has_data(of.block.name)[first : first + of.length_bytes // TARGET_PAGE_BYTES]
    data = 0
    for start, rows in _batches(image, of, wanted):
        has_data: Mask = rows.any(axis=1)  # type: ignore[assignment]  # of two axes, one is left
        for begin, stop in runs(has_data).tolist():
            at = of.address + (start + begin) * TARGET_PAGE_BYTES
            file.write_at(at, rows[begin:stop].data)
            data += (stop - begin) * TARGET_PAGE_BYTES
    return data


def _pour(image: Image, ranges: Sequence[PhysicalRange], path: Path) -> int:
    """Write memory from its first byte to its last, zeros included."""
    data = at = 0
    with path.open("wb", buffering=0) as file:
        for each in ranges:
            for start in range(at, each.address, _BATCH_PAGES * TARGET_PAGE_BYTES):
                _put(file, bytes(min(each.address - start, _BATCH_PAGES * TARGET_PAGE_BYTES)))
            every = np.ones(each.length_bytes // TARGET_PAGE_BYTES, np.bool_)
            for _, rows in _batches(image, each, every):
                data += int(rows.any(axis=1).sum()) * TARGET_PAGE_BYTES
                _put(file, rows.data)
            at = each.end
    return data


def _put(file: RawIOBase, piece: bytes | memoryview) -> None:
    left = memoryview(piece).cast("B")
    while len(left):
        left = left[file.write(left) :]


def _batches(image: Image, of: PhysicalRange, wanted: Mask) -> Iterator[tuple[int, PageRows]]:
    """Yield the wanted pages of a range in batches: the first page of each, and the bytes."""
    first = of.block_offset // TARGET_PAGE_BYTES
    for begin, end in runs(wanted).tolist():
        for start in range(begin, end, _BATCH_PAGES):
            count = min(_BATCH_PAGES, end - start)
            yield start, image.read(of.block.name, first + start, count)
