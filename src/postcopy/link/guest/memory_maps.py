"""The map of a guest's memory, for those that watch: made when one asks, and shared by all of them."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from postcopy.errors import PostcopyError, WrongState
from postcopy.link.guest.job import MigrationState
from postcopy.link.protocol import OutgoingCommands
from postcopy.statistics import MAP_STATES, MemoryMap, cells_of
from postcopy.status import Status

_LEAST_AGE_S: Final = 0.2
_SHARE: Final = 100
"""A map is as old as this many times its cost before another is made: it costs a hundredth of a CPU."""

_ANSWER_S: Final = 5.0
_LETTERS: Final = {name: letter for letter, name in MAP_STATES.items()}
_STILL_TO_COME: Final = ("at-source", "on-its-way", "asked-for", "dirty-again")
_GONE: Final = "the memory's map is not known: the engine that sends the guest does not answer"


class MemoryMaps:
    """Makes the map of one guest; any thread may ask.

    Invariant, under ``_lock``: one thread makes a map, and the others take it.
    """

    def __init__(self, state: MigrationState, clock: Callable[[], float] = time.monotonic) -> None:
        self._state = state
        self._clock = clock
        self._lock = threading.Lock()
        self._last: MemoryMap | None = None
        self._made_s = 0.0
        self._of: object = None

    def look(self) -> MemoryMap:
        """Give the map as it is, or was a moment ago.

        :raises WrongState: it is not known.
        """
        with self._lock:
            job = self._state.work
            key = job, job.status
            if self._last is None or key != self._of or self._clock() >= self._made_s:
                begin = self._clock()
                self._last = self._make()
                cost_s = self._clock() - begin
                self._made_s = self._clock() + max(_LEAST_AGE_S, _SHARE * cost_s)
                self._of = key
            return self._last

    def _make(self) -> MemoryMap:
        job = self._state.work
        if any(self._state.keeper.lost.values()):
            return self._with_losses()
        if job.incoming:
            return self._incoming(job.status)
        if not job.busy:
            return self._all("in-place" if job.status is Status.COMPLETED else "at-source")
        return self._outgoing()

    def _outgoing(self) -> MemoryMap:
        link = self._state.engines.link
        try:
            if link is not None:
                return link.ask(OutgoingCommands.memory_map).wait(_ANSWER_S)
        except WrongState:
            return self._all("at-source")  # it has not begun yet
        except (PostcopyError, TimeoutError) as error:
            raise WrongState(f"{_GONE}: {error}") from error
        raise WrongState(_GONE)

    def _incoming(self, status: Status) -> MemoryMap:
        from postcopy.link.guest import missing_pages  # numpy: not before it is needed

        regions, page_maps = self._state.keeper.paged()
        if not page_maps:
            here = self._state.guest.owned or status is Status.COMPLETED
            return self._all("in-place" if here else "at-source")
        return missing_pages.draw_map(regions, page_maps)

    def _with_losses(self) -> MemoryMap:
        """What had not come when the source was given up is lost; see :meth:`look` before that."""
        lost = sum(self._state.keeper.lost.values())
        last = self._last or self._all("in-place")
        table = {ord(_LETTERS[name]): _LETTERS["lost"] for name in _STILL_TO_COME}
        total = sum(pages for _, _, pages in last.blocks)
        pages = {"in-place": total - lost, "lost": lost}
        return replace(last, cells=last.cells.translate(table), pages=pages)

    def _all(self, state: str) -> MemoryMap:
        blocks = [(each.name, each.size_bytes >> 12) for each in self._state.guest.regions()]
        _, counts = cells_of(blocks)
        return MemoryMap(
            self._state.work.incoming,
            _LETTERS[state] * sum(counts),
            {state: sum(pages for _, pages in blocks)},
            tuple((name, n, pages) for (name, pages), n in zip(blocks, counts, strict=True)),
        )
