"""Sets of pages as boolean masks, and the runs of neighbouring pages in them.

Every hot path works on runs, so that the cost of Python is paid once a run and never once a page.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Mask: TypeAlias = npt.NDArray[np.bool_]
Indices: TypeAlias = npt.NDArray[np.int64]


def runs(mask: Mask) -> npt.NDArray[np.int64]:
    """Return the maximal runs of set pages.

    :return: shape ``(n, 2)``: first page and end page (not included) of each run, ascending.
    """
    padded = np.zeros(len(mask) + 2, np.int8)
    padded[1:-1] = mask
    edges = np.flatnonzero(np.diff(padded))
    return edges.reshape(-1, 2)


def mask_of(ranges: npt.NDArray[np.int64], length: int) -> Mask:
    """Turn ``[start, end)`` ranges into a mask, without a statement a range."""
    edges = np.zeros(length + 1, np.int8)
    edges[ranges[:, 0]] = 1
    edges[ranges[:, 1]] -= 1
    return np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_)


def index_runs(pages: Indices) -> npt.NDArray[np.int64]:
    """Return the runs of consecutive numbers in ``pages``, in their order.

    :param pages: page numbers in any order, such as those of one batch of the stream.
    :return: shape ``(n, 2)``: positions in ``pages`` where a run begins and ends (not included).
    """
    if not len(pages):
        return np.empty((0, 2), np.int64)
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(pages)]))
    return np.stack((starts, ends), axis=1)


def numbers_in(ranges: npt.NDArray[np.int64], bound: int) -> Indices:
    """Return every number in the ranges, without a statement a range: there may be thousands.

    :param ranges: first number and length of each, shape ``(n, 2)``; they may overlap.
    :param bound: all numbers are below it, so that overlapping ranges take no more memory than that.
    """
    starts, lengths = ranges[:, 0], ranges[:, 1]
    total = int(lengths.sum())
    if total > bound:
        edges = np.zeros(bound + 1, np.int32)
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + lengths, -1)
        return np.flatnonzero(np.cumsum(edges[:-1]))
    before = np.cumsum(lengths) - lengths
    numbers: Indices = np.repeat(starts - before, lengths) + np.arange(total)
    return numbers


def next_set(mask: Mask, start: int, limit: int) -> Indices:
    """Return up to ``limit`` set pages at or after ``start``, ascending."""
    if mask[start : start + limit].all() and start + limit <= len(mask):
        return np.arange(start, start + limit)
    found: list[Indices] = []
    missing = limit
    position = start
    step = max(4 * limit, 4096)
    while missing > 0 and position < len(mask):
        here = np.flatnonzero(mask[position : position + step])[:missing]
        if len(here):
            found.append(here + position)
            missing -= len(here)
        position += step
        step = min(step * 4, 1 << 20)
    return np.concatenate(found) if found else np.empty(0, np.int64)
