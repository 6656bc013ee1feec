"""Put the memory of an image into a store: neither zeros nor chunks that the store has take space."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from postcopy.image.chunked import PAGES_PER_CHUNK
from postcopy.image.digests import CHUNK_BYTES, chunk_count
from postcopy.image.formats import Image, ImageBlock
from postcopy.image.manifest import StoredBlock
from postcopy.image.publish import never_cancelled
from postcopy.image.store.store import ChunkStore, Intake
from postcopy.memory.runs import Indices

STORE_NAME: Final = "postcopy-chunks"
"""The folder of chunks beside an image, unless its parent has one."""

_THREADS: Final = 2
_BATCH_CHUNKS: Final = 64


@dataclass(frozen=True, slots=True)
class Packed:
    """Bytes of memory by what was done with them.

    :ivar zero_bytes: chunks of zeros, which are not stored.
    :ivar reused_bytes: chunks that the store had already, or that occurred twice.
    :ivar new_bytes: chunks that it had not; they take ``stored_bytes`` there.
    """

    zero_bytes: int = 0
    reused_bytes: int = 0
    new_bytes: int = 0
    stored_bytes: int = 0


def pack(
    image: Image, store: ChunkStore, check: Callable[[], None] = never_cancelled
) -> tuple[dict[str, StoredBlock], Packed]:
    """Put an image's memory into a store.

    :param check: called now and then; an exception of it ends the work.
    :return: the blocks as a manifest has them, and the figures.
    :raises OSError: the disk is full, or broken.
    """
    blocks, taken = {}, Packed()
    with store.intake() as intake, ThreadPoolExecutor(_THREADS, "chunks") as pool:
        for block in image.blocks:
            stored, its = _pack_block(image, block, intake, pool, check)
            blocks[block.name] = stored
            taken = Packed(
                taken.zero_bytes + its.zero_bytes,
                taken.reused_bytes + its.reused_bytes,
                taken.new_bytes + its.new_bytes,
                taken.stored_bytes + its.stored_bytes,
            )
    return blocks, taken


def _pack_block(
    image: Image,
    block: ImageBlock,
    intake: Intake,
    pool: ThreadPoolExecutor,
    check: Callable[[], None],
) -> tuple[StoredBlock, Packed]:
    count = chunk_count(block.size_bytes)
    starts = np.arange(0, block.pages, PAGES_PER_CHUNK)
    suspects = np.flatnonzero(np.logical_or.reduceat(image.has_data(block.name), starts))
    present = np.zeros(count, np.bool_)
    addresses: list[bytes] = []
    new = stored = kept = 0

    def put(chunks: Indices) -> list[tuple[int, bytes, int]]:
        found, data = [], []
        for chunk in chunks.tolist():
            check()
            first = chunk * PAGES_PER_CHUNK
            rows = image.read(block.name, first, min(PAGES_PER_CHUNK, block.pages - first))
            if rows.any():
                found.append(chunk)
                data.append(rows.tobytes())
        return [(chunk, *taken) for chunk, taken in zip(found, intake.put(data), strict=True)]

    batches = [suspects[at : at + _BATCH_CHUNKS] for at in range(0, len(suspects), _BATCH_CHUNKS)]
    for found in pool.map(put, batches):
        for chunk, address, written in found:
            length = min(CHUNK_BYTES, block.size_bytes - chunk * CHUNK_BYTES)
            present[chunk] = True
            addresses.append(address)
            kept += length
            new += length if written else 0
            stored += written
    packed = Packed(block.size_bytes - kept, kept - new, new, stored)
    return StoredBlock(present, b"".join(addresses)), packed


def store_of(path: Path) -> Path:
    """Return the store of an image without a parent."""
    return path.parent / STORE_NAME
