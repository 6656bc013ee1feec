"""Threads that read or write the pages of a mapped-ram file, each over a descriptor of its own."""

import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from postcopy.channel.files import FileChannel
from postcopy.errors import ChannelBroken, PostcopyError
from postcopy.kernel import threads

FileWork: TypeAlias = Callable[[FileChannel], None]
"""What one thread does with its descriptor."""


class FileThreads:
    """Does what it is given, in any order, until :meth:`flush`.  One thread calls all but :meth:`shutdown`.

    :param file: the threads get duplicates of it.
    :raises HostCannot: there can be no more threads.
    """

    def __init__(self, file: FileChannel, count: int) -> None:
        self._changed = threading.Condition()
        # Under `_changed`:
        self._work: deque[FileWork] = deque()
        self._busy = 0
        self._failure: PostcopyError | None = None
        self._closed = False
        self._files: list[FileChannel] = []
        self._threads: list[threading.Thread] = []
        try:
            for number in range(count):
                self._files.append(file.duplicate())
                thread = threading.Thread(
                    target=self._run,
                    args=(self._files[-1],),
                    name=f"multifd-{number}",
                    daemon=True,
                )
                self._threads.append(threads.start(thread))
        except BaseException:
            self.close()
            raise

    @property
    def moved_bytes(self) -> int:
        """Bytes read or written so far."""
        return sum(file.sent_bytes + file.received_bytes for file in self._files)

    def do(self, work: FileWork) -> None:
        """Have this done by and by; wait while there is much to do.

        :raises PostcopyError: something before has failed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._work) < 2 * len(self._files) or self._is_over()
            )
            self._check()
            self._work.append(work)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is done.

        :raises PostcopyError: something has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: not (self._work or self._busy) or self._is_over())
            self._check()

    def shutdown(self) -> None:
        """Begin nothing more, and end the calls that are under way; from any thread."""
        with self._changed:
            self._closed = True
            self._work.clear()
            self._changed.notify_all()
        for file in tuple(self._files):
            file.shutdown()

    def close(self) -> None:
        """End; on return no memory is touched any more.  Any number of times."""
        self.shutdown()
        for thread in self._threads:
            thread.join()
        for file in self._files:
            file.close()

    def _is_over(self) -> bool:
        return self._closed or self._failure is not None

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise ChannelBroken("multifd: closed on this side")

    # --- the threads "multifd-N"

    def _run(self, file: FileChannel) -> None:
        while self._do_next(file):
            pass

    def _do_next(self, file: FileChannel) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._work or self._is_over())
            if self._is_over():
                return False
            work = self._work.popleft()
            self._busy += 1
            self._changed.notify_all()
        failure: PostcopyError | None = None
        try:
            work(file)
        except PostcopyError as error:
            failure = error
        with self._changed:
            self._busy -= 1
            self._failure = self._failure or failure
            self._changed.notify_all()
        return True
