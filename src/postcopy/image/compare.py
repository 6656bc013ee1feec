"""The differences of two images."""

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from postcopy.image.device_fields import device_fields
from postcopy.image.formats import Image
from postcopy.memory.runs import Mask, runs
from postcopy.stream.described_state import flatten

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
class FieldDifference:
    """One field of a device of two images.

    :ivar field: its path, such as ``env.regs[3]``; ``version`` is that of the section.
    :ivar a, b: its values; ``None`` where there is no such field.
    """

    device: str
    field: str
    a: int | str | None
    b: int | str | None


@dataclass(frozen=True, slots=True)
class Difference:
    """All that differs between two images.

    :ivar devices: sections that differ, or that one lacks, such as ``cpu 0``.
    :ivar fields: the fields of those that both have.
    """

    machines: tuple[str, str]
    blocks: tuple[BlockDifference, ...] = ()
    devices: tuple[str, ...] = field(default=())
    fields: tuple[FieldDifference, ...] = field(default=())

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
    names = (a.machine_name, b.machine_name)
    blocks, devices = tuple(_blocks(a, b)), tuple(_devices(a, b))
    fields = tuple(_fields(a, b, devices)) if devices else ()
    return Difference(names, blocks, tuple(f"{name} {number}" for name, number in devices), fields)


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


def _devices(a: Image, b: Image) -> Iterator[tuple[str, int]]:
    states_a, states_b = (
        {(each.name, each.instance): (each.version, each.payload) for each in image.devices}
        for image in (a, b)
    )
    for key in dict.fromkeys((*states_a, *states_b)):
        if states_a.get(key) != states_b.get(key):
            yield key


def _fields(a: Image, b: Image, differing: Container[tuple[str, int]]) -> Iterator[FieldDifference]:
    """Compare the devices that differ, field by field."""
    of_b = {each.name: each for each in device_fields(b)}
    for one in device_fields(a):
        other = of_b.get(one.name)
        if other is None or (one.section.name, one.section.instance) not in differing:
            continue
        if one.section.version != other.section.version:
            yield FieldDifference(one.name, "version", one.section.version, other.section.version)
        fields_a, fields_b = dict(flatten(one.fields)), dict(flatten(other.fields))
        for path in dict.fromkeys((*fields_a, *fields_b)):
            value_a, value_b = fields_a.get(path), fields_b.get(path)
            if value_a != value_b:
                yield FieldDifference(one.name, path, value_a, value_b)
