"""Which threads wait for which page.

A wait begins when the pager reads its fault, before it looks whether the page has come.  A page's wait
ends after it has been noted as received.  So of the two threads one always sees what the other has done:
the pager finds the page received, or the thread that places it finds the wait.
"""

import threading
from collections.abc import Iterable

from postcopy.paging.blocktime import Blocktime


class FaultTable:
    """Called by the pager and by the threads that place pages.

    Invariant, under the lock: a page is a key only while a thread waits for it; :class:`Blocktime` has
    been told of each of these waits, and not of its end.

    :param blocktime: is told when waits begin and end, under this table's lock.
    """

    def __init__(self, blocktime: Blocktime) -> None:
        self.blocktime = blocktime
        self._lock = threading.Lock()
        self._waits: dict[str, dict[int, list[tuple[int, int]]]] = {}  # thread, since when

    def begin(self, block: str, page: int, thread_id: int, now_ns: int) -> None:
        """A thread waits for a page."""
        with self._lock:
            self._waits.setdefault(block, {}).setdefault(page, []).append((thread_id, now_ns))
            self.blocktime.begin(thread_id, now_ns)

    def waiting(self, block: str) -> list[int]:
        """Which pages of a block threads wait for."""
        pages = self._waits.get(block)
        return list(pages) if pages else []

    def end(self, block: str, pages: Iterable[int], now_ns: int) -> None:
        """These pages are in place: their waits are over."""
        with self._lock:
            waits = self._waits.get(block, {})
            for page in pages:
                for thread_id, since_ns in waits.pop(page, ()):
                    self.blocktime.end(thread_id, since_ns, now_ns)

    def withdraw(self, block: str, page: int, thread_id: int, since_ns: int) -> None:
        """Forget a wait that began when its page was in place: how long it took is not known."""
        with self._lock:
            waits = self._waits.get(block, {}).get(page, [])
            if (thread_id, since_ns) not in waits:
                return  # it has ended meanwhile, and been measured
            waits.remove((thread_id, since_ns))
            if not waits:
                del self._waits[block][page]
            self.blocktime.withdraw(thread_id)
