"""Which thread reads a descriptor: its own, or for a while another one that is awake anyway.

A message that a vCPU waits for should not also have to wait until a second thread has been woken, has
got a CPU and has got the interpreter, when a first one has all of these.  So that one may borrow the
turn to read, and looks by itself between two pieces of its own work.
"""

import os
import select
import threading

from postcopy.kernel import calls
from postcopy.kernel.descriptors import close_all, open_all


class ReadingTurn:
    """Passes the turn to read between the thread that owns it and one that borrows it.

    :param fds: what is read, and what else is a reason to read: any of them readable.  They are only
        looked at here, through duplicates: they may be closed meanwhile.
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
        # Under `_changed`: whether the borrower wants the turn, whether it has it, whether the owner is
        # to read even if nothing has come, and whether it has gone.
        self._wanted = False
        self._borrowed = False
        self._at_once = False
        self._ended = False

    # --- the owner

    def wait(self) -> None:
        """Sleep until there is something to read, and it is the owner's turn to do so."""
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
        """Read no more: no thread gets the turn from here on."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            for fd in (*self._fds, self._call):
                os.close(fd)

    # --- the borrower

    def borrow(self) -> None:
        """Take the turn, unless the owner has gone or is about to; see :attr:`is_borrowed`."""
        with self._changed:
            if self._ended or self._wanted or self._at_once:
                return
            self._wanted = True
            os.eventfd_write(self._call, 1)
            self._changed.wait_for(lambda: self._borrowed or self._ended)

    def give_back(self, *, at_once: bool = False) -> None:
        """Let the owner go on.  Harmless without the turn.

        :param at_once: it is to read even if nothing comes any more: there is an end to be found.
        """
        with self._changed:
            self._wanted = False
            self._at_once |= at_once
            self._changed.notify_all()

    @property
    def is_borrowed(self) -> bool:
        """Whether the borrower has it: only the borrower itself changes that."""
        return self._borrowed and self._wanted

    def is_readable(self, timeout_s: float | None = 0) -> bool:
        """Whether there is something to read, or comes within the time; for the thread that has the turn.

        :param timeout_s: None: for as long as it takes.
        """
        timeout_ms = None if timeout_s is None else timeout_s * 1000
        return bool(calls.of_python("poll", "", self._glance.poll, timeout_ms))
