"""The path of a Unix socket that is listened at: a live listener's stays, an ended one's goes."""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path


class SocketPath:
    """Takes a path away again only while it is still the socket that was bound there.

    :raises OSError: there is no such path.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._bound = self._path.lstat()

    def remove(self) -> None:
        """Take it away, unless it is another process's by now, or gone."""
        with contextlib.suppress(OSError):
            if os.path.samestat(self._path.lstat(), self._bound):
                self._path.unlink()


def remove_stale(path: Path) -> None:
    """Take away a stream socket whose listener has ended; anything else at the path stays.

    :raises OSError: it cannot be taken away.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if stat.S_ISSOCK(mode) and _is_refused(path):
        path.unlink()


def _is_refused(path: Path) -> bool:
    """Whether no process listens; a full queue, missing rights, another kind of socket do not say so."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED
