"""The threads of a link that answer calls; each goes on to the next call when it is done.

One is there from the start, so that a process that can have no more threads still answers.
"""

import queue
import threading
from collections.abc import Callable
from typing import Final

from postcopy.kernel import threads

_MOST_IDLE: Final = 4

Work = Callable[[], None]


class Workers:
    """Any number of threads, of which a few wait for more to do.

    Invariant, under the lock: ``_idle`` is how many of them are waiting, or are about to, and have not been
    given anything yet.

    :param name: of a thread that waits; one at work has the name of its work.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._works: queue.SimpleQueue[tuple[str, Work] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._ended = False

    def start(self) -> None:
        """Have one ready.

        :raises HostCannot: there can be no more threads.
        """
        self._idle = 1
        try:
            self._start()
        except BaseException:
            self._idle = 0
            raise

    def give(self, name: str, work: Work) -> None:
        """Have it done; one that waits does it, or else a new one.

        :raises HostCannot: none waits, and there can be no more threads.
        """
        if not self._take_idle():
            # One that has just answered may be about to wait again.
            self._start(unless=self._take_idle)
        self._works.put((name, work))

    def end(self) -> None:
        """Let those go that wait, and the others when they are done; nothing is given any more."""
        with self._lock:
            self._ended = True
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._works.put(None)

    def _take_idle(self) -> bool:
        """Have one that waits do the next; return whether there is one."""
        with self._lock:
            is_idle = self._idle > 0
            self._idle -= is_idle
            return is_idle

    def _start(self, unless: Callable[[], bool] = lambda: False) -> None:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        threads.start(thread, unless)

    def _run(self) -> None:
        while self._work_once():
            with self._lock:
                if self._ended or self._idle >= _MOST_IDLE:
                    return
                self._idle += 1

    def _work_once(self) -> bool:
        """Do one thing, and hold on to nothing of it; return False if there is nothing more to do."""
        given = self._works.get()
        if given is None:
            return False
        this = threading.current_thread()
        this.name, work = given
        try:
            work()
        finally:
            this.name = self._name
        return True
