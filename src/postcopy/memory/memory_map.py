"""Makes a small map of where a guest's pages are: one letter for a run of pages.

It is made only when a watcher asks, by a few passes of numpy over a byte a page, which hold no lock
and give the interpreter lock up.
"""

import time
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.memory import page_map
from postcopy.memory.runs import Mask
from postcopy.statistics import MAP_STATES, MemoryMap, cells_of

Codes = npt.NDArray[np.uint8]
"""The state of each page: its place in :data:`MAP_STATES`."""

_LETTERS: Final = "".join(MAP_STATES)
SOURCE, ON_ITS_WAY, IN_PLACE, DIRTY_AGAIN, ASKED_FOR, ZERO, LOST = range(len(_LETTERS))
_URGENT: Final = (ASKED_FOR, LOST)
_OF_PAGE_MAP: Final = np.zeros(page_map.REMOVED + 1, np.uint8)
_OF_PAGE_MAP[[page_map.MISSING, page_map.REQUESTED, page_map.PLACING]] = (
    SOURCE,
    ASKED_FOR,
    ON_ITS_WAY,
)
_OF_PAGE_MAP[[page_map.RECEIVED, page_map.REMOVING, page_map.REMOVED]] = IN_PLACE, ZERO, ZERO


class PendingLook:
    """What a source says of one block; keeps one mask from look to look, and nothing before the first."""

    def __init__(self) -> None:
        self._before: Mask | None = None

    def codes(self, pending: Mask, known_data: Mask, *, passed: bool) -> Codes:
        """The state of each page.

        A page that has left the pending ones since the last look is on its way.

        :param pending: pages that are to be sent.
        :param known_data: pages that have memory behind them; the others are zero if they were sent.
        :param passed: each page has been sent once: what is pending has been written since.
        """
        pending = pending.copy()  # the sending thread goes on
        found = np.where(known_data, np.uint8(IN_PLACE), np.uint8(ZERO))
        if self._before is not None:
            found[self._before & ~pending] = ON_ITS_WAY
        found[pending] = DIRTY_AGAIN if passed else SOURCE
        self._before = pending
        return found


def codes_of_page_map(states: npt.NDArray[np.uint8]) -> Codes:
    """What a destination says of one block, by its page map."""
    return _OF_PAGE_MAP[np.minimum(states, page_map.REMOVED)]


def draw(
    blocks: Sequence[tuple[str, int, Codes]], *, incoming: bool, begin_s: float | None = None
) -> MemoryMap:
    """Make the map.

    :param blocks: of each RAM block its name, how many pages of 4 KiB make one of its pages, and the
        states of its pages.
    :param begin_s: when the work for it began, by ``time.monotonic``.
    """
    begin_s = time.monotonic() if begin_s is None else begin_s
    sizes = [(name, len(codes) * each) for name, each, codes in blocks]
    run, counts = cells_of(sizes)
    totals = np.zeros(len(_LETTERS), np.int64)
    parts = []
    for (_, each, codes), cells in zip(blocks, counts, strict=True):
        found = _per_cell(codes, each, run, cells)
        totals += np.bincount(codes, minlength=len(_LETTERS)) * each
        parts.append(found)
    letters = np.frombuffer(_LETTERS.encode(), np.uint8)
    return MemoryMap(
        incoming,
        b"".join(letters[part].tobytes() for part in parts).decode(),
        {name: int(n) for name, n in zip(MAP_STATES.values(), totals, strict=True) if n},
        tuple((name, cells, n) for (name, n), cells in zip(sizes, counts, strict=True)),
        round((time.monotonic() - begin_s) * 1e6),
    )


def _per_cell(codes: Codes, each: int, run: int, cells: int) -> Codes:
    """The state that each cell shows.

    :param each: pages of 4 KiB in one of ``codes``; may be more than ``run``.
    """
    starts = np.arange(cells) * run // each
    best = np.zeros(cells, np.int64)
    shown = np.zeros(cells, np.uint8)
    for state in range(len(_LETTERS)):
        is_there = codes == state
        if not is_there.any():
            continue
        count = np.add.reduceat(is_there, starts, dtype=np.int64)
        if state in _URGENT:
            count[count > 0] += len(codes)
        better = count > best
        shown[better], best[better] = state, count[better]
    return shown
