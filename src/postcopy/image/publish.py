"""Names of images: a free name is reserved while its image is written, and published once."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from postcopy.channel.path_lock import path_locked
from postcopy.channel.whole_file import check_replaceable, partial_name, remove_leftovers
from postcopy.errors import MigrationCancelled, Refused
from postcopy.image.file_kinds import MANIFEST_SUFFIX


def check_free(path: Path) -> None:
    """Refuse a name under which nothing can be published.

    :raises Refused: the name, or that of its manifest, exists, or there is no such folder.
    """
    for name in (path, path.with_name(path.name + MANIFEST_SUFFIX)) if path.name else (path,):
        check_replaceable(name)
        if os.path.lexists(name):
            raise Refused(f"{name} exists; remove it, or give another path")
    if not path.parent.is_dir():
        raise Refused(f"{path.parent} is no folder; make it, or give another path")


@contextlib.contextmanager
def reserved(path: Path) -> Iterator[Path]:
    """Reserve a free name for one image, and yield the path of its partial file.

    Partial files of earlier attempts are removed at the start, this one at the end.

    :raises Refused: the name is not free, or another process writes an image for it.
    :raises OSError: nothing can be written there.
    """
    check_free(path)
    with path_locked(path):
        check_free(path)  # it may have been published meanwhile
        remove_leftovers(path)
        written = partial_name(path)
        try:
            yield written
        finally:
            with contextlib.suppress(OSError):
                written.unlink()


class CommitPoint:
    """Decides between the cancel of a snapshot and the publication of its file.  For any thread.

    Invariant, under the lock: at most one of the two has been decided, and a decision is final.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._committed = False

    def cancel(self, on_cancel: Callable[[], object] = lambda: None) -> bool:
        """Decide that the file is not published; return whether that was in time.

        :param on_cancel: called if it was, before the writer can see it.
        """
        with self._lock:
            if self._committed:
                return False
            self._cancelled = True
            on_cancel()
            return True

    def check(self) -> None:
        """Return while the snapshot is not cancelled; its writer calls this now and then.

        :raises MigrationCancelled: it is.
        """
        if self._cancelled:
            raise MigrationCancelled("the snapshot was given up; the guest runs on")

    def commit(self) -> None:
        """Decide that the file is published; the caller then publishes it.

        :raises MigrationCancelled: the snapshot is cancelled.
        """
        with self._lock:
            self.check()
            self._committed = True


def never_cancelled() -> None:
    """Stand in for :meth:`CommitPoint.check` where nothing can be cancelled."""
