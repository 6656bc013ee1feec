"""Threads that are given work until one of them fails: what those of channels and of files have in common.

:class:`FileThreads` read or write the pages of a mapped-ram file, each over a descriptor of its own.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Self, TypeAlias

from postcopy.channel.files import FileChannel
from postcopy.errors import ChannelBroken, PostcopyError
from postcopy.kernel import threads
from postcopy.parameters import Capabilities, Capability, Parameters

FileWork: TypeAlias = Callable[[FileChannel], None]
"""What one thread does with its descriptor."""


class MultifdThreads:
    """Threads ``multifd-N``, one for each channel or file, and what may end them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # Under `_changed`:
        self._failure: PostcopyError | None = None
        self._closed = False
        self._threads: list[threading.Thread] = []

    def _start(self, run: Callable[[], None]) -> None:
        """Start the next thread.

        :raises HostCannot: there can be no more threads.
        """
        name = f"multifd-{len(self._threads)}"
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(threads.start(thread))

    def _is_over(self) -> bool:
        return self._closed or self._failure is not None

    def _wait_until(self, reached: Callable[[], bool]) -> None:
        """Wait, under ``_changed``, for the other threads to come so far.

        :raises PostcopyError: one has failed.
        :raises ChannelBroken: this side has been closed.
        """
        self._changed.wait_for(lambda: reached() or self._is_over())
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise ChannelBroken("multifd: closed on this side")

    def _wait_for_work(self, there_is: Callable[[], bool]) -> bool:
        """Wait, under ``_changed``, for something to do; return False if nothing will come."""
        self._changed.wait_for(lambda: there_is() or self._is_over())
        return not self._is_over()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()


@dataclass(frozen=True, slots=True)
class FileAccess:
    """How the pages of a mapped-ram file are written or read.

    :ivar threads: so many do it at the same time; 0: the caller alone.
    :ivar direct: the threads do it past the page cache (``O_DIRECT``).
    """

    threads: int = 0
    direct: bool = False

    @classmethod
    def wanted(cls, capabilities: Capabilities, parameters: Parameters) -> Self:
        """As the user wants it; as in QEMU, ``direct-io`` is for the threads of multifd alone."""
        if not capabilities.enabled(Capability.MULTIFD):
            return cls()
        return cls(parameters.multifd_channels, parameters.direct_io)


ALONE: Final = FileAccess()


class FileThreads(MultifdThreads):
    """Does what it is given, in any order, until :meth:`flush`.  One thread calls all but :meth:`shutdown`.

    :param file: the threads get descriptors of their own of it.
    :raises HostCannot: there can be no more threads, or no direct access to the file.
    :raises ChannelBroken: there can be no more descriptors.
    """

    def __init__(self, file: FileChannel, access: FileAccess) -> None:
        super().__init__()
        # Under `_changed`:
        self._work: deque[FileWork] = deque()
        self._busy = 0
        self._files: list[FileChannel] = []
        try:
            for _ in range(access.threads):
                self._files.append(file.duplicate(direct=access.direct))
                self._start(partial(self._run, self._files[-1]))
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
            self._wait_until(lambda: len(self._work) < 2 * len(self._files))
            self._work.append(work)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is done.

        :raises PostcopyError: something has failed.
        """
        with self._changed:
            self._wait_until(lambda: not (self._work or self._busy))

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
        self._join()
        for file in self._files:
            file.close()

    # --- the threads "multifd-N"

    def _run(self, file: FileChannel) -> None:
        while self._do_next(file):
            pass

    def _do_next(self, file: FileChannel) -> bool:
        with self._changed:
            if not self._wait_for_work(lambda: bool(self._work)):
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
