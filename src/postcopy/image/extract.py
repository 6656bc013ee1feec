"""Write the memory of one block of an image to a plain file, byte for byte; zeros become holes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from postcopy.channel.path_lock import path_locked
from postcopy.channel.whole_file import Place, WholeFile
from postcopy.errors import Refused
from postcopy.image.base import PageRows
from postcopy.image.file_kinds import look_at_target
from postcopy.image.formats import Image, ImageBlock
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Mask, runs

_BATCH_PAGES: Final = 1024


def choose_block(image: Image, name: str | None) -> ImageBlock:
    """Find a block by its name; without one, the largest.

    :raises Refused: there is no such block.
    """
    if name is None:
        return max(image.blocks, key=lambda block: block.size_bytes)
    for block in image.blocks:
        if block.name == name:
            return block
    names = ", ".join(block.name for block in image.blocks)
    raise Refused(f"{image.path} has no block '{name}'; it has {names}")


def extract(image: Image, block: ImageBlock, path: Path) -> int:
    """Write a block to a file, which replaces an existing one, or into a FIFO or a device.

    :return: the bytes of data; the rest are holes, or zeros where there can be no holes.
    :raises Refused: the existing file must not be replaced, or another process writes there.
    :raises OSError: the disk is full, or broken; no file has got the name.
    :raises ImageError: the image cannot be read.
    """
    try:
        if path.exists() and path.samefile(image.path):
            raise Refused(f"{path} is the image itself; give another path for its memory")
        if look_at_target(path) is Place.DEVICE:
            return _pour(image, block, path)
        with path_locked(path), WholeFile(path) as file:
            os.ftruncate(file.fd, block.size_bytes)
            data = _write(file, image, block)
            file.publish()
        return data
    except OSError as failure:  # it may name the lock file, or no file
        raise OSError(failure.errno, failure.strerror, str(path)) from failure


def _write(file: WholeFile, image: Image, block: ImageBlock) -> int:
    data = 0
    for start, rows in _batches(image, block, image.has_data(block.name)):
        has_data: Mask = rows.any(axis=1)  # type: ignore[assignment]  # of two axes, one is left
        for begin, stop in runs(has_data).tolist():
            file.write_at((start + begin) * TARGET_PAGE_BYTES, rows[begin:stop].data)
            data += (stop - begin) * TARGET_PAGE_BYTES
    return data


def _pour(image: Image, block: ImageBlock, path: Path) -> int:
    """Write a block from its first byte to its last, zeros included."""
    data = 0
    with path.open("wb", buffering=0) as file:
        for _, rows in _batches(image, block, np.ones(block.pages, np.bool_)):
            data += int(rows.any(axis=1).sum()) * TARGET_PAGE_BYTES
            left = memoryview(rows.data).cast("B")
            while len(left):
                left = left[file.write(left) :]
    return data


def _batches(image: Image, block: ImageBlock, wanted: Mask) -> Iterator[tuple[int, PageRows]]:
    """Yield the wanted pages in batches: the first page of each, and the bytes."""
    for first, end in runs(wanted).tolist():
        for start in range(first, end, _BATCH_PAGES):
            yield start, image.read(block.name, start, min(_BATCH_PAGES, end - start))
