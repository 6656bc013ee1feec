"""An image that is made of a QEMU's file while the QEMU still writes that.

The QEMU writes a plain stream to a file, and not to this process: a process that is killed must not end a
background snapshot, with which older QEMUs would leave their guest standing.  A thread reads the file as it
grows.  It takes the digests, and writes the pages to their places in a mapped-ram file; when the QEMU has
written the last byte, only the end is left to do.
"""

import contextlib
import os
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from postcopy.channel.whole_file import WholeFile
from postcopy.errors import MigrationCancelled, PostcopyError
from postcopy.image.options import Form
from postcopy.kernel import threads

if TYPE_CHECKING:
    from postcopy.image.finalize import Prepared

_POLL_S: Final = 0.005


class ArrivingImage:
    """Makes one image; use it in a ``with``, in which the image is published.

    What cannot be made on the way is made of the whole file, as if there had been no such object: its
    errors say what is wrong.

    :param written: the file that the QEMU writes; it may not exist yet.
    :param path: of the image.
    :param form: of the image.
    """

    def __init__(self, written: Path, path: Path, form: Form) -> None:
        self._written = written
        self._path = path
        self._form = form
        self._complete = threading.Event()
        self._given_up = threading.Event()
        self._read_bytes = 0
        self._prepared: Prepared | None = None
        self._file: WholeFile | None = None
        self._thread = threading.Thread(target=self._run, name="arriving", daemon=True)
        self._is_running = False

    def __enter__(self) -> "ArrivingImage":
        with contextlib.suppress(PostcopyError, OSError):
            if self._form == "mapped-ram":
                # Before the QEMU's file is there: it would be taken for what a killed writer has left.
                self._file = WholeFile(self._path)
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def begin(self) -> None:
        """Read from now on; the thread first imports what it needs, which keeps other threads waiting."""
        if self._file is not None or self._form == "stream":
            self._is_running = threads.start_if_possible(self._thread)

    def give_up(self) -> None:
        """End the thread, and remove what has not been published.  Any number of times."""
        self._given_up.set()
        if self._is_running:
            self._thread.join()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def finish(self) -> "Prepared | None":
        """Wait until all is done of a file that is written no more; ``None``: it has to be done anew."""
        if not self._is_running:
            return None
        self._complete.set()
        self._thread.join()
        try:
            whole = self._written.stat().st_size == self._read_bytes
        except OSError:
            return None
        return self._prepared if whole else None  # nothing may stand behind the end

    def _run(self) -> None:
        try:
            from postcopy.receive import making

            with self._open() as source:
                if self._file is None:
                    self._prepared = making.sum_up(lambda buffer: self._fill(source, buffer))
                else:
                    self._prepared = making.write_anew(
                        lambda buffer: self._fill(source, buffer), self._file
                    )
        except (PostcopyError, OSError, MemoryError):
            self._close()  # it takes room, of which there may be too little

    def _open(self) -> IO[bytes]:
        while True:
            try:
                return self._written.open("rb", buffering=0)
            except FileNotFoundError:
                self._wait()

    def _wait(self) -> None:
        """Wait until there may be more.

        :raises MigrationCancelled: the image is not wanted any more.
        """
        self._given_up.wait(_POLL_S)
        if self._given_up.is_set():
            raise MigrationCancelled("the image has been given up")

    def _fill(self, source: IO[bytes], buffer: memoryview) -> int:
        """Read some of what there is, or what comes next; 0: at the end of the file."""
        while True:
            complete = self._complete.is_set()  # before the read: what is read then is all
            count = os.readv(source.fileno(), [buffer])
            self._read_bytes += count
            if count or complete:
                return count
            self._wait()
