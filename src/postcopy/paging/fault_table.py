"""Which threads wait for which page.

A wait begins when the pager reads its fault, before it looks whether the page has come.  A page's wait
ends after it has been noted as received.  So of the two threads one always sees what the other has done:
the pager finds the page received, or the thread that places it finds the wait.
"""

import threading
from collections.abc import Iterable, Sequence

from postcopy.paging.blocktime import Blocktime
from postcopy.paging.shared_space import SharedSpace


class FaultTable:
    """Called by the pager and by the threads that place pages.

    Invariant, under the lock: a page is a key only while a thread waits for it, of ``_elsewhere`` while a
    thread of another process does; :class:`Blocktime` has been told of each of these waits, and not of its
    end.

    :param blocktime: is told when waits begin and end, under this table's lock.
    """

    def __init__(self, blocktime: Blocktime) -> None:
        self.blocktime = blocktime
        self._lock = threading.Lock()
        self._waits: dict[str, dict[int, list[tuple[int, int]]]] = {}  # thread, since when
        self._elsewhere: dict[tuple[str, int], list[SharedSpace]] = {}

    def begin(
        self,
        block: str,
        page: int,
        thread_id: int,
        now_ns: int,
        space: SharedSpace | None = None,
    ) -> None:
        """A thread waits for a page.

        :param space: of which other process; None: it is the guest's own.
        """
        with self._lock:
            self._waits.setdefault(block, {}).setdefault(page, []).append((thread_id, now_ns))
            if space is not None:
                self._elsewhere.setdefault((block, page), []).append(space)
            self.blocktime.begin(thread_id, now_ns)

    def waiting(self, block: str) -> list[int]:
        """Which pages of a block threads wait for."""
        pages = self._waits.get(block)
        return list(pages) if pages else []

    def waiting_elsewhere(self, block: str, pages: Sequence[int]) -> list[tuple[SharedSpace, int]]:
        """Which other processes wait for which of these pages."""
        if not self._elsewhere:
            return []
        with self._lock:
            found = [(page, set(self._elsewhere.get((block, page), ()))) for page in pages]
        return [(space, page) for page, spaces in found for space in spaces]

    def end(self, block: str, pages: Iterable[int], now_ns: int) -> None:
        """These pages are in place: their waits are over."""
        with self._lock:
            waits = self._waits.get(block, {})
            for page in pages:
                for thread_id, since_ns in waits.pop(page, ()):
                    self.blocktime.end(thread_id, since_ns, now_ns)
                if self._elsewhere:
                    self._elsewhere.pop((block, page), None)

    def withdraw(
        self,
        block: str,
        page: int,
        thread_id: int,
        since_ns: int,
        space: SharedSpace | None = None,
    ) -> None:
        """Forget a wait that began when its page was in place: how long it took is not known."""
        with self._lock:
            waits = self._waits.get(block, {}).get(page, [])
            if (thread_id, since_ns) not in waits:
                return  # it has ended meanwhile, and been measured
            waits.remove((thread_id, since_ns))
            if space is not None:
                spaces = self._elsewhere[block, page]
                spaces.remove(space)
                if not spaces:
                    del self._elsewhere[block, page]
            if not waits:
                del self._waits[block][page]
            self.blocktime.withdraw(thread_id)
