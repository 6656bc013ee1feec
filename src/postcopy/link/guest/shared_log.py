"""What other processes write to a guest's memory: they mark it in a log, of two files in turn.

Python cannot take the bits of a log and clear them in one step, while a process sets others.  So each
process is given the other file, which is empty.  When all have answered, none touches the first any more:
it is read, and emptied.  The files are the guest's, so that what a process has marked outlives it.

A process that hangs is waited for by an engine's call alone, no longer than its front end does, and never
under a lock that a monitor or a vCPU needs.
"""

import os
import threading
import time
from contextlib import suppress
from typing import Final

from postcopy.errors import GuestError, PostcopyError, WrongState
from postcopy.guest import SharingProcess
from postcopy.kernel import memfd, threads
from postcopy.kernel.calls import close_all, of_python, open_all
from postcopy.link.guest.sharing import SharingGuest

_PAGE_BYTES: Final = 4096
_BYTE_COVERS: Final = 8 * _PAGE_BYTES
_LEAVE_S: Final = 1.0
"""How long a process that does not answer may take to be found to have ended."""
_LOOK_S: Final = 0.005


class SharedLog:
    """Has the processes that share a guest's memory log their writes, or write nothing.

    :param guest: whose memory it is; :meth:`join` is to be called with each process that joins.
    """

    def __init__(self, guest: SharingGuest) -> None:
        self._guest = guest
        self._lock = threading.Lock()  # never held while a process is waited for
        # Under the lock.
        self._log: _Log | None = None
        self._ending: threading.Thread | None = None
        self._has_been_shared = False
        self._refuses = False
        self._is_held = False

    def start(self) -> bool:
        """See :meth:`postcopy.guest.Keeper.start_shared_log`."""
        with self._lock:
            self._has_been_shared |= bool(self._guest.shared_with())
            self._refuses = not self._has_been_shared
            if self._refuses:
                return False
            if self._log is None:
                self._log = _Log(self._guest)
            log, ending, self._ending = self._log, self._ending, None
        try:
            if ending is not None:
                ending.join()  # or its last word to a process would come behind our first
            log.begin()
        except BaseException:
            self.stop()
            raise
        return True

    def fetch(self) -> bytes:
        """See :meth:`postcopy.guest.Keeper.fetch_shared_log`."""
        with self._lock:
            log = self._log
        if log is None:
            raise WrongState("the writes of other processes are not being logged")
        return log.fetch()

    def stop(self) -> None:
        """See :meth:`postcopy.guest.Keeper.stop_shared_log`; a thread of its own tells the processes."""
        with self._lock:
            log, self._log, self._refuses = self._log, None, False
            if log is None:
                return
            thread = threading.Thread(target=log.end, name="shared-log", daemon=True)
            if threads.start_if_possible(thread):
                self._ending = thread
                return
        log.end()

    def join(self, process: SharingProcess) -> None:
        """One more process is about to touch the memory: it is treated as the others are.

        :raises PostcopyError: it cannot log its writes, and a migration or a reset needs that.
        """
        with self._lock:
            if self._is_held:
                process.hold()
            else:
                process.release()  # what is held may be a device, whose last process has ended meanwhile
            if self._refuses:
                raise GuestError(
                    f"{process.name}: the guest is being moved or has a reset point, and its memory had "
                    "not been shared before; share it when that has ended"
                )
            self._has_been_shared = True
            log = self._log
        if log is not None:
            log.tell(process)

    def hold(self) -> None:
        """Let none of them write, from the guest's next stop on."""
        with self._lock:
            self._is_held = True
            for process in self._guest.shared_with():
                process.hold()

    def release(self) -> None:
        """Let them write again."""
        with self._lock:
            if self._is_held:
                self._is_held = False
                for process in self._guest.shared_with():
                    process.release()


class _Log:
    """The two files, from the beginning of one migration or reset point to its end.

    :param guest: whose memory it is.
    :raises KernelError: the files cannot be made.
    """

    def __init__(self, guest: SharingGuest) -> None:
        self._guest = guest
        ranges = [part for region in guest.regions() for part in region.physical_ranges]
        end = max(part.address + part.length_bytes for part in ranges)
        self._size = -(-end // _BYTE_COVERS // _PAGE_BYTES) * _PAGE_BYTES
        self._lock = threading.Lock()  # held while a process is waited for: one question at a time
        # Under the lock.
        self._files = open_all(
            lambda number: memfd.create_sealed(f"shared-log-{number}", self._size), range(2)
        )
        self._current = 0
        self._in_doubt = False
        """Whether a process may mark in either file, since an exchange of them has failed."""
        self._taken = b""
        """What a fetch has taken that failed afterwards."""
        self._told: list[SharingProcess] = []
        self._ended = False

    def begin(self) -> None:
        """Have each process mark its writes, unless it does.

        :raises PostcopyError: one cannot.
        """
        for process in self._guest.shared_with():
            self.tell(process)

    def tell(self, process: SharingProcess) -> None:
        """As :meth:`begin`, of one process."""
        with self._lock:
            if not self._ended and process not in self._told:
                self._told.append(process)
                self._ask(process)

    def fetch(self) -> bytes:
        """Have them use the other file, and take what is in this one.

        When one has not answered, the others may mark in either file: the next fetch takes both.

        :raises PostcopyError: one does not answer.
        """
        with self._lock:
            if self._ended:
                raise WrongState("the writes of other processes are not being logged any more")
            exchanges, self._in_doubt = 2 if self._in_doubt else 1, True
            for _ in range(exchanges):
                self._taken = _united(self._taken, self._exchange())
            taken, self._taken, self._in_doubt = self._taken, b"", False
            return taken

    def _exchange(self) -> bytes:
        full, self._current = self._current, 1 - self._current
        left = self._guest.shared_with()
        self._told = [process for process in self._told if process in left]
        for process in self._told:
            self._ask(process)
        return self._take(self._files[full])

    def _ask(self, process: SharingProcess) -> None:
        try:
            process.log_writes(self._files[self._current], self._size)
        except PostcopyError:
            if not self._has_left(process):
                raise

    def _has_left(self, process: SharingProcess) -> bool:
        """Whether it has ended: then it marks nothing more, and what it has marked counts."""
        until_s = time.monotonic() + _LEAVE_S
        while process in self._guest.shared_with():
            if time.monotonic() > until_s:
                return False
            time.sleep(_LOOK_S)
        return True

    def _take(self, fd: int) -> bytes:
        if not os.fstat(fd).st_blocks:
            return b""
        found: bytes = of_python("pread", "of a dirty log", os.pread, fd, self._size, 0)
        memfd.empty(fd, 0, self._size)
        return found.rstrip(b"\0")

    def end(self) -> None:
        """No process need mark anything any more."""
        with self._lock:
            self._ended = True
            for process in self._told:
                with suppress(PostcopyError):  # it has ended, or hangs
                    process.log_writes(None)
            close_all(self._files)


def _united(log: bytes, other: bytes) -> bytes:
    """The marks of both."""
    if not log or not other:
        return log or other
    both = int.from_bytes(log, "little") | int.from_bytes(other, "little")
    return both.to_bytes(max(len(log), len(other)), "little")
