"""A lock that goes to who has been waiting for it."""

import threading


class Turns:
    """As ``threading.Lock`` in a ``with``, but in turns.

    Whoever gives an ordinary lock back and wants it again at once gets it, for who waits has to wake up
    first; so a thread that copies page after page would keep out the one on which a vCPU waits.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = threading.Lock()  # held by the one that waits for the lock

    def __enter__(self) -> None:
        with self._next:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
