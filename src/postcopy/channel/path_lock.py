"""One writer at a time for each file: a lock beside it, which dies with its holder."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from postcopy.errors import Refused

SUFFIX: Final = ".partial.lock"
_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_MODE: Final = 0o600
_HELD: Final = frozenset({errno.EWOULDBLOCK, errno.EAGAIN})


class PathLock:
    """The right to write what is to become the file at ``path``, until :meth:`release`.

    The lock of a dead process does not count: the kernel has released it, see flock(2).  Where files cannot
    be locked at all, nothing is excluded.

    :raises Refused: another process is writing it.
    :raises OSError: nothing can be written there.
    """

    def __init__(self, path: str | Path) -> None:
        self._lock = Path(f"{path}{SUFFIX}")
        while True:
            self._fd = os.open(self._lock, _FLAGS, _MODE)
            is_free = _locked(self._fd)
            if is_free and self._is_there():
                return
            os.close(self._fd)
            if not is_free:
                raise Refused(
                    f"another process is writing {path}; wait until that is done, or give another path"
                )
            # Its holder has taken it away meanwhile: the next process would not see ours.

    def release(self) -> None:
        """Let others write; any number of times."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        with contextlib.suppress(OSError):
            self._lock.unlink()
        os.close(fd)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), self._lock.lstat())
        except FileNotFoundError:
            return False


@contextlib.contextmanager
def path_locked(path: str | Path) -> Iterator[None]:
    """Hold a :class:`PathLock` in a ``with``."""
    claim = PathLock(path)
    try:
        yield
    finally:
        claim.release()


def _locked(fd: int) -> bool:
    """Whether no other process has it locked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        return failure.errno not in _HELD
    return True
