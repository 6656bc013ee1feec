"""Fills a block from an image where nothing can be waited for yet: the guest does not run before the end.

So nothing is watched, and no userfaultfd is needed; the page map says how far it has come.
"""

from typing import Final

import numpy as np

from postcopy.errors import ImageError
from postcopy.lazy_restore.block import Lost
from postcopy.lazy_restore.image_source import ImagePageSource
from postcopy.memory.page_map import RECEIVED
from postcopy.memory.runs import runs
from postcopy.paging.ram import IncomingBlock

_WINDOW_PAGES: Final = 1 << 14
_PIECE_BYTES: Final = 4 << 20


def fill(paged: IncomingBlock, source: ImagePageSource) -> Lost | None:
    """Copy all pages with data that have not been copied before, by this engine or another.

    :return: the first pages that cannot be had; the others are left alone then.
    """
    states = paged.pages.states
    for start in range(0, len(states), _WINDOW_PAGES):
        end = min(start + _WINDOW_PAGES, len(states))
        todo = source.has_data(start, end) & (states[start:end] < RECEIVED)
        for first, last in runs(todo).tolist():
            lost = _fill_run(paged, source, start + first, start + last)
            if lost is not None:
                return lost
    return None


def _fill_run(paged: IncomingBlock, source: ImagePageSource, first: int, end: int) -> Lost | None:
    block, page = paged.block, first
    piece, rows = max(1, _PIECE_BYTES // block.page_size_bytes), block.target_pages_per_page
    while page < end:
        count = source.good(page, min(piece, end - page))
        try:
            contents = source.read(page, count) if count else None
        except ImageError:
            contents = None
        if contents is None:
            bad, after = source.bad(page)
            return Lost(block.name, after - bad, source.reason(page))
        block.pages[page * rows : (page + count) * rows] = np.asarray(contents)
        paged.pages.states[page : page + count] = RECEIVED  # not before it is whole
        page += count
    return None
