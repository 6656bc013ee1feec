"""A lock on this host: one command at a time drives a machine whose settings are persistent."""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Final, Self

from postcopy.channel.address import parse_socket
from postcopy.errors import Refused

_PATIENCE_S: Final = 5.0
_POLL_S: Final = 0.02
_MOST_BYTES: Final = 1 << 20
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_HELD: Final = frozenset({errno.EWOULDBLOCK, errno.EAGAIN})


class MachineLock:
    """Held while a machine's settings are changed; the kernel releases it when its process dies.

    Its file stays only while something is noted in it.
    """

    def __init__(self, fd: int, path: Path | None = None) -> None:
        self._fd = fd
        self._path = path

    @classmethod
    async def take(cls, address: str) -> Self:
        """Take the lock of the machine at this QMP address; without file locks nothing is held.

        :raises Refused: another command has held it for seconds.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + _PATIENCE_S
        while True:
            try:
                path = _file_of(address)
                fd = os.open(path, _FLAGS, 0o600)
            except OSError:
                return cls(-1)  # the folder is another user's, or the disk is full
            if _locked(fd, path):
                return cls(fd, path)
            os.close(fd)
            if loop.time() > until:
                raise Refused(
                    f"another command runs a migration or snapshot of the machine at {address}; wait "
                    "until it has ended"
                )
            await asyncio.sleep(_POLL_S)

    @classmethod
    def take_at_once(cls, address: str) -> Self | None:
        """Take the lock if something is noted in its file, and no command holds it."""
        try:
            path = _file_of(address)
            fd = os.open(path, _FLAGS & ~os.O_CREAT)
        except OSError:
            return None
        if _locked(fd, path):
            return cls(fd, path)
        os.close(fd)
        return None

    def read(self) -> bytes:
        """Return the text that its last holder has left; nothing of another user."""
        if self._fd < 0 or os.fstat(self._fd).st_uid != os.geteuid():
            return b""
        return os.pread(self._fd, _MOST_BYTES, 0)

    def write(self, text: bytes) -> None:
        """Replace the text, which the next holder reads if this process is killed."""
        if self._fd >= 0:
            # A text that is cut off is no JSON, and so is ignored.
            with contextlib.suppress(OSError):  # disk full: as if it had not been written
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, text, 0)

    def release(self) -> None:
        """Release the lock, and remove its file if nothing is noted there; harmless when done."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        with contextlib.suppress(OSError):
            if self._path is not None and not os.fstat(fd).st_size:
                self._path.unlink()  # while it is locked: see _locked
        os.close(fd)


def _file_of(address: str) -> Path:
    """Return the lock's file, the same for each name of one socket.

    It is not in XDG_RUNTIME_DIR, which a job of cron does not have.

    :raises OSError: its folder cannot be had, or may be written by other users.
    """
    where = parse_socket(address, "QMP").endpoint
    name = str(Path(where).resolve()) if isinstance(where, str) else f"{where[0]}:{where[1]}"
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"postcopy-{os.geteuid()}"
    folder.mkdir(0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(folder))
    return folder / f"{digest}.lock"


def _locked(fd: int, path: Path) -> bool:
    """Whether it is locked by us now, or files cannot be locked there."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        return failure.errno not in _HELD
    try:
        return os.path.samestat(os.fstat(fd), path.stat())  # its last holder may have removed it
    except OSError:
        return False
