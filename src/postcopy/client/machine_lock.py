"""A lock on this host: one command at a time drives a machine whose settings are persistent."""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
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
    """Held while a machine's settings are changed; the kernel releases it when its process dies."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    async def take(cls, address: str) -> Self:
        """Take the lock of the machine at this QMP address; without file locks nothing is held.

        :raises Refused: another command has held it for seconds.
        """
        try:
            fd = os.open(_file_of(address), _FLAGS, 0o600)
        except OSError:
            return cls(-1)  # a file of another user, or the disk is full
        try:
            await _lock(fd, address)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

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
        """Release the lock; harmless when done."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _file_of(address: str) -> Path:
    """Return the lock's file, the same for each name of one socket."""
    where = parse_socket(address, "QMP").endpoint
    name = str(Path(where).resolve()) if isinstance(where, str) else f"{where[0]}:{where[1]}"
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"postcopy-orders-{digest}.lock"


async def _lock(fd: int, address: str) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as failure:
            if failure.errno not in _HELD:
                return  # files cannot be locked there
        else:
            return
        if loop.time() > until:
            raise Refused(
                f"another command runs a migration or snapshot of the machine at {address}; wait until it "
                "has ended"
            )
        await asyncio.sleep(_POLL_S)
