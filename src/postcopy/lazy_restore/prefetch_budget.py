"""How much of its working set is prefetched before a restored guest runs: a bounded amount.

Each page that is prefetched before the guest runs saves a fault, and nothing but the start of the guest
waits for it.  So the prefetch begins when the memory is registered, goes on while the devices are
loaded, and has a head start: the first few MiB, however long they take, which is all of a small set; and
of a larger one as much as comes in a time that a user does not notice.  Both bounds are the same whatever
the guest's size.
"""

import threading
import time
from typing import Final

LEAST_BYTES: Final = 8 << 20
MOST_NS: Final = 60_000_000


class HeadStart:
    """The pager tells what has been brought; the thread that is to run the guest waits.

    :param wanted: whether there is a working set.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._until_ns = time.monotonic_ns() + MOST_NS
        self._left_bytes = LEAST_BYTES
        self._least = threading.Event()
        self._all = threading.Event()
        self._ended = False
        self._given_up = False
        if not wanted:
            self.end()

    @property
    def ended(self) -> bool:
        """Whether the guest runs, or has nothing to wait for any more."""
        return self._ended

    def brought(self, size_bytes: int) -> None:
        """So much more of the working set is in place."""
        self._left_bytes -= size_bytes
        if self._left_bytes <= 0:
            self._least.set()

    def give_up(self) -> None:
        """No more will come: a guest that does not run yet must not be let run."""
        self._given_up = True
        self.end()

    def end(self) -> None:
        """All of it is in place."""
        self._ended = True
        self._least.set()
        self._all.set()

    def wait(self) -> bool:
        """Return whether the guest is to run, as soon as that is known."""
        self._least.wait()
        self._all.wait(max(0, self._until_ns - time.monotonic_ns()) / 1e9)
        self._ended = True
        return not self._given_up
