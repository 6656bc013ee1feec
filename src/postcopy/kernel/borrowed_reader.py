"""Lets one thread read a descriptor in place of the thread that owns it, for a while.

To wake the owner takes a CPU and the interpreter lock, which the thread that runs already has.  So a busy
thread may borrow the right to read, and checks for a message between two pieces of its own work: a vCPU
may wait for what the message asks for.
"""

import os
import select
import threading

from postcopy.kernel import calls
from postcopy.kernel.calls import close_all, open_all


class BorrowedReader:
    """Passes the right to read between the thread that owns it and one that borrows it.

    :param fds: descriptors of which each, once readable, is a reason to read.  They are only polled here,
        through duplicates, so the caller may close its own meanwhile.
    """

    def __init__(self, *fds: int) -> None:
        self._fds = open_all(lambda fd: calls.of_python("dup", "", os.dup, fd), fds)
        try:
            flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
            self._call = calls.of_python("eventfd", "", os.eventfd, 0, flags)
        except BaseException:
            close_all(self._fds)
            raise
        self._sleep = select.poll()
        self._sleep.register(self._call, select.POLLIN)
        self._glance = select.poll()
        for fd in self._fds:
            self._sleep.register(fd, select.POLLIN)
            self._glance.register(fd, select.POLLIN)
        self._changed = threading.Condition()
        # Under `_changed`: whether the borrower wants to read, whether it may, whether the owner is to
        # read even if nothing has come, and whether the owner has ended.
        self._wanted = False
        self._borrowed = False
        self._at_once = False
        self._ended = False

    # --- the owner

    def wait(self) -> None:
        """Wait until there is something to read, and the owner has the right to read it."""
        while not self._lend():
            ready = calls.of_python("poll", "", self._sleep.poll)
            if all(fd != self._call for fd, _ in ready):
                return
            os.eventfd_read(self._call)

    def _lend(self) -> bool:
        with self._changed:
            if self._wanted:
                self._borrowed = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._wanted or self._at_once)
                self._borrowed = False
            at_once, self._at_once = self._at_once, False
        return at_once

    def end(self) -> None:
        """Read no more: from here on no thread can borrow."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            for fd in (*self._fds, self._call):
                os.close(fd)

    # --- the borrower

    def borrow(self) -> None:
        """Borrow the right to read, unless the owner has ended or is about to; see :attr:`is_borrowed`."""
        with self._changed:
            if self._ended or self._wanted or self._at_once:
                return
            self._wanted = True
            os.eventfd_write(self._call, 1)
            self._changed.wait_for(lambda: self._borrowed or self._ended)

    def give_back(self, *, at_once: bool = False) -> None:
        """Let the owner read again.  Harmless if nothing was borrowed.

        :param at_once: the owner is to read even if nothing more comes: it will find the end.
        """
        with self._changed:
            self._wanted = False
            self._at_once |= at_once
            self._changed.notify_all()

    @property
    def is_borrowed(self) -> bool:
        """Whether the borrower has the right to read; only the borrower itself changes that."""
        return self._borrowed and self._wanted

    def is_readable(self, timeout_s: float | None = 0) -> bool:
        """Whether there is something to read, or comes within the time; for the thread that may read.

        :param timeout_s: None: for as long as it takes.
        """
        timeout_ms = None if timeout_s is None else timeout_s * 1000
        return bool(calls.of_python("poll", "", self._glance.poll, timeout_ms))
