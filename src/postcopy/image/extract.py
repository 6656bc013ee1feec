"""The memory of one block of an image as a plain file, byte for byte; zeros become holes."""

import os
from pathlib import Path
from typing import Final

from postcopy.channel.claim import claimed
from postcopy.errors import Refused
from postcopy.image.formats import Image, ImageBlock
from postcopy.image.publish import MODE, partial, publish
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
    """Write a block to a file, in the place of what is there.

    :return: how many bytes of data were written; the rest are holes.
    :raises Refused: that is the image itself, or somebody else is writing there.
    :raises OSError: the disk is full, or broken; nothing stands under the name then.
    :raises ImageError: the image cannot be read.
    """
    if path.exists() and path.samefile(image.path):
        raise Refused(f"{path} is the image itself; give another path for its memory")
    try:
        with claimed(path):
            return _extract(image, block, path)
    except OSError as failure:  # which may name what stands beside it, or nothing
        raise OSError(failure.errno, failure.strerror, str(path)) from failure


def _extract(image: Image, block: ImageBlock, path: Path) -> int:
    written = partial(path)
    try:
        fd = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, MODE)
        try:
            os.ftruncate(fd, block.size_bytes)
            data = _write(fd, image, block)
        finally:
            os.close(fd)
        publish(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    return data


def _write(fd: int, image: Image, block: ImageBlock) -> int:
    data = 0
    for first, end in runs(image.has_data(block.name)).tolist():
        for start in range(first, end, _BATCH_PAGES):
            rows = image.read(block.name, start, min(_BATCH_PAGES, end - start))
            has_data: Mask = rows.any(axis=1)  # type: ignore[assignment]  # of two axes, one is left
            for begin, stop in runs(has_data).tolist():
                piece = memoryview(rows[begin:stop].data).cast("B")
                offset = (start + begin) * TARGET_PAGE_BYTES
                data += len(piece)
                while len(piece):
                    count = os.pwrite(fd, piece, offset)
                    piece, offset = piece[count:], offset + count
    return data
