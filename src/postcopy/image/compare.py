"""The differences of two images."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from postcopy.image.formats import Image
from postcopy.memory.runs import Mask, runs

_BATCH_PAGES: Final = 1024


@dataclass(frozen=True, slots=True)
class BlockDifference:
    """One block of two images.

    :ivar pages: the number of pages that differ.
    :ivar runs: where they are: first page and end page (not included).
    :ivar only_in: ``a`` or ``b`` for a block that the other image lacks, or has in another size.
    """

    name: str
    pages: int = 0
    runs: tuple[tuple[int, int], ...] = ()
    only_in: str | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """All that differs between two images.

    :ivar devices: sections that differ, or that one lacks, such as ``cpu 0``.
    """

    machines: tuple[str, str]
    blocks: tuple[BlockDifference, ...] = ()
    devices: tuple[str, ...] = field(default=())

    @property
    def pages(self) -> int:
        """The number of pages that differ, of all blocks."""
        return sum(block.pages for block in self.blocks)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        same = self.machines[0] == self.machines[1] and not self.devices
        return same and not any(block.pages or block.only_in for block in self.blocks)


def compare(a: Image, b: Image) -> Difference:
    """Compare two images of any formats.

    :raises ImageError: one of them cannot be read.
    """
    return Difference((a.machine_name, b.machine_name), tuple(_blocks(a, b)), tuple(_devices(a, b)))


def _blocks(a: Image, b: Image) -> Iterator[BlockDifference]:
    sizes_b = {block.name: block.size_bytes for block in b.blocks}
    for block in a.blocks:
        if sizes_b.pop(block.name, None) != block.size_bytes:
            yield BlockDifference(block.name, only_in="a")
            continue
        differing = _differing(a, b, block.name)
        where = tuple((first, end) for first, end in runs(differing).tolist())
        yield BlockDifference(block.name, int(differing.sum()), where)
    for name in sizes_b:
        yield BlockDifference(name, only_in="b")


def _differing(a: Image, b: Image, name: str) -> Mask:
    suspects = a.has_data(name) | b.has_data(name)
    differing = np.zeros(len(suspects), np.bool_)
    for first, end in runs(suspects).tolist():
        for start in range(first, end, _BATCH_PAGES):
            count = min(_BATCH_PAGES, end - start)
            one, other = a.read(name, start, count), b.read(name, start, count)
            words = one.view(np.uint64) != other.view(np.uint64)
            differing[start : start + count] = words.any(axis=1)
    return differing


def _devices(a: Image, b: Image) -> Iterator[str]:
    states_a, states_b = (
        {(each.name, each.instance): (each.version, each.payload) for each in image.devices}
        for image in (a, b)
    )
    for key in dict.fromkeys((*states_a, *states_b)):
        if states_a.get(key) != states_b.get(key):
            yield f"{key[0]} {key[1]}"
