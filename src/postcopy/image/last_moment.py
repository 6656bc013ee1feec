"""The moment after which a snapshot cannot be given up any more, since its file gets its name."""

import threading
from collections.abc import Callable

from postcopy.errors import MigrationCancelled


class LastMoment:
    """A file is given up or gets its name, never both.  For any thread.

    Invariant, under the lock: at most one of the two has been decided, and it is not taken back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given_up = False
        self._decided = False

    def give_up(self, tell: Callable[[], object] = lambda: None) -> bool:
        """Decide that it gets no name; return whether that was in time.

        :param tell: called when it was, before the writer can see it.
        """
        with self._lock:
            if self._decided:
                return False
            self._given_up = True
            tell()
            return True

    def check(self) -> None:
        """Return while it has not been given up; the writer asks now and then.

        :raises MigrationCancelled: it has.
        """
        if self._given_up:
            raise MigrationCancelled("the snapshot was given up; the guest runs on")

    def decide(self) -> None:
        """Decide that it gets its name: the caller goes on to give it.

        :raises MigrationCancelled: it has been given up.
        """
        with self._lock:
            self.check()
            self._decided = True


def go_on() -> None:
    """In the place of :meth:`LastMoment.check` where nothing can be given up."""
