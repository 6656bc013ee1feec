"""What the guest's process does with the pages that its page maps say are missing."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from postcopy.errors import PageExists
from postcopy.guest import AddressSpace, MappedRange, Region
from postcopy.kernel.pagemap import PagemapScanner, unmap
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.memory import memory_map, page_map
from postcopy.memory.runs import Mask, runs
from postcopy.statistics import MemoryMap


def unmap_missing(regions: Sequence[Region], page_maps: Sequence[int]) -> None:
    """Unmap, in this process alone, what has not been received; the memory stays.

    :param page_maps: their descriptors, one a region.
    """
    for region, pages in _opened(regions, page_maps):
        unmap(_addresses(region, pages.missing()))


def poison(
    watch: Userfaultfd,
    regions: Sequence[Region],
    page_maps: Sequence[int],
    counts: dict[str, int],
) -> None:
    """Make each touch of a missing page fail.

    :param counts: how many of each block are poisoned by now; it goes on from there.
    :raises KernelError: some pages are not poisoned yet: do it again.
    """
    for region, pages in _opened(regions, page_maps):
        counts.setdefault(region.name, 0)
        for first, end in runs(pages.missing()).tolist():
            for done in _poison(watch, region, first, end):
                counts[region.name] += done


def draw_map(regions: Sequence[Region], page_maps: Sequence[int]) -> MemoryMap:
    """Make the map of a guest that arrives, for a watcher."""
    begin_s = time.monotonic()
    blocks = [
        (region.name, region.page_size_bytes >> 12, memory_map.codes_of_page_map(pages.states))
        for region, pages in _opened(regions, page_maps)
    ]
    return memory_map.draw(blocks, incoming=True, begin_s=begin_s)


def mapped(space: AddressSpace, regions: Sequence[Region], page_maps: Sequence[int]) -> int:
    """How many pages a process has mapped that have not been received.

    :raises KernelError: it has ended, or is not ours to look at.
    """
    found = 0
    with PagemapScanner(space.process_id) as scanner:
        for region, pages in _opened(regions, page_maps):
            size = region.page_size_bytes
            for part, first, last in _parts(space.ranges, region):
                there = scanner.mapped(part.address, last - first, size)
                found += int((there & pages.missing()[first:last]).sum())
    return found


def poison_ranges(
    watch: Userfaultfd,
    ranges: Sequence[MappedRange],
    regions: Sequence[Region],
    page_maps: Sequence[int],
) -> None:
    """Make each touch of a missing page fail in a process that has these ranges mapped.

    :param watch: the userfaultfd of that process.
    :raises KernelError: the process has ended.
    """
    for region, pages in _opened(regions, page_maps):
        for part, first, last in _parts(ranges, region):
            there = replace(region, host_address=part.address - part.offset)
            for start, end in (first + runs(pages.missing()[first:last])).tolist():
                for _ in _poison(watch, there, start, end):
                    pass


def _parts(ranges: Sequence[MappedRange], region: Region) -> Iterator[tuple[MappedRange, int, int]]:
    """Those of a block, with their first page and end page."""
    for part in ranges:
        if part.block == region.name:
            first = part.offset // region.page_size_bytes
            yield part, first, first + part.length_bytes // region.page_size_bytes


def _opened(
    regions: Sequence[Region], page_maps: Sequence[int]
) -> Iterator[tuple[Region, page_map.PageMap]]:
    for region, fd in zip(regions, page_maps, strict=True):
        pages = page_map.PageMap(os.dup(fd), region.size_bytes // region.page_size_bytes)
        yield region, pages
        pages.close()


def _addresses(region: Region, pages: Mask) -> npt.NDArray[np.uint64]:
    """Where the runs of these pages are mapped: address and length of each, shape ``(n, 2)``."""
    ranges = runs(pages).astype(np.uint64) * np.uint64(region.page_size_bytes)
    ranges[:, 1] -= ranges[:, 0]
    ranges[:, 0] += np.uint64(region.host_address)
    return ranges


def _poison(watch: Userfaultfd, region: Region, first: int, end: int) -> Iterator[int]:
    """Poison the pages of a run that are still missing; tell of each call how many those were."""
    size = region.page_size_bytes
    position, stop = (region.host_address + page * size for page in (first, end))
    while position < stop:
        try:
            done = watch.poison(position, stop - position)
            yield done // size
        except PageExists:
            # The engine had placed it, and died before it could say so; or it has been poisoned.
            done = size
        position += done
