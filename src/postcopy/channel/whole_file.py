"""The one way in which a file is made here: it has its name when it is whole, and replaces no other thing.

What is being written stands beside it, as ``NAME.0123456789abcdef.partial`` with sixteen random digits: no
two writers meet, and no name is known beforehand.  The file is locked, see flock(2), for as long as its
writer lives, so the next command tells what a killed one has left behind, and removes it.

What a name may stand for is decided by :func:`look_at` alone.  A regular file is replaced, in one step and
only by a whole one.  A FIFO or a device is never replaced: it is written to where the bytes make sense in
order, and else refused, as everything else is.
"""

import contextlib
import enum
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from postcopy.errors import Refused

MODE: Final = 0o600  # guest memory holds keys and passwords

_SUFFIX: Final = ".partial"
_TOKEN_BYTES: Final = 8
_LONGEST_STEM_BYTES: Final = 255 - len(f".{'0' * 2 * _TOKEN_BYTES}{_SUFFIX}")
_PARTIAL: Final = re.compile(r"(.+)\.[0-9a-f]{16}\.partial", re.DOTALL)
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""What link(2) fails with on a file system that has no second names for a file."""


class Place(enum.Enum):
    """What stands at a name at which a file is to be made."""

    FREE = enum.auto()
    FILE = enum.auto()
    DEVICE = enum.auto()
    """A FIFO, too: bytes can be written to it in order."""


def look_at(path: Path) -> Place:
    """Tell what stands at a name.

    :raises Refused: no file can be made there, or what is there must stay.
    :raises OSError: it cannot be told, such as without the right to look.
    """
    if not path.name:
        raise Refused(f"'{path}' is not the name of a file; give the path of a file")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return Place.FREE
    except ValueError as error:
        raise Refused(f"{str(path)!r} has a zero byte in it; give another path") from error
    if stat.S_ISLNK(mode):
        if _leads_to_device(path):
            return Place.DEVICE
        raise Refused(f"{path} is a symbolic link; remove it, or give the path that it leads to")
    if stat.S_ISDIR(mode):
        raise Refused(f"{path} is a folder; give the path of a file")
    if stat.S_ISSOCK(mode):
        raise Refused(f"{path} is a socket; give another path")
    return Place.FILE if stat.S_ISREG(mode) else Place.DEVICE


def check_replaceable(path: Path) -> None:
    """As :func:`look_at`, for a file that must get this very name.

    :raises Refused: also a FIFO or a device.
    """
    if look_at(path) is Place.DEVICE:
        raise Refused(f"{path} is a device or a FIFO, which no file can replace; give another path")


def _leads_to_device(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def partial_name(path: Path) -> Path:
    """A name beside ``path`` that no other file has."""
    return path.with_name(f"{_stem(path)}.{os.urandom(_TOKEN_BYTES).hex()}{_SUFFIX}")


def is_partial(path: Path) -> bool:
    """Whether it is a name of :func:`partial_name`: what stands there is to be renamed by its maker."""
    return _PARTIAL.fullmatch(path.name) is not None


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers have left half-written beside ``path``."""
    _remove_dead(path.parent, _stem(path))


def remove_all_leftovers(folder: Path) -> None:
    """Remove what killed writers have left half-written in a folder, whatever it was to become."""
    _remove_dead(folder, None)


def give_name(partial: Path, path: Path, *, replacing: bool) -> None:
    """Rename a file that is whole, and on the disk.

    :param replacing: take the place of a regular file that has the name.
    :raises Refused: something else has the name.
    :raises OSError: the name cannot be given; nothing has changed.
    """
    check_replaceable(path)
    if replacing:
        partial.replace(path)
    else:
        _give_free_name(partial, path)
    try:
        _sync_folder(path.parent)
    except OSError:
        if not replacing:  # of what was replaced nothing is left to put back
            path.unlink()
        raise


class WholeFile:
    """A file in the making; leave the ``with`` without :meth:`publish`, and nothing of it stays.

    :ivar fd: open for reading and writing, at its beginning.
    :ivar partial: its name until it is published.
    :raises Refused: nothing can be replaced there.
    :raises OSError: nothing can be written there; names ``path``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._published = False
        check_replaceable(path)
        with _told_of(path):
            remove_leftovers(path)
            self.partial, self.fd = _create(path)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of ``data`` from a byte of the file on.

        :raises OSError: the disk does not take it.
        """
        left = memoryview(data).cast("B")
        with _told_of(self.path):
            while len(left):
                count = os.pwrite(self.fd, left, offset)
                left, offset = left[count:], offset + count

    def publish(self, *, replacing: bool = True) -> None:
        """Give it its name; see :func:`publish`."""
        publish(self.partial, self.path, replacing=replacing)
        self._published = True

    def close(self) -> None:
        """Remove it if it has not been published; any number of times."""
        fd, self.fd = self.fd, -1
        if fd < 0:
            return
        if not self._published:
            with contextlib.suppress(OSError):
                self.partial.unlink()
        os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def kept(partial: Path) -> Iterator[None]:
    """Keep what another process has written from being removed as a dead writer's.

    :raises OSError: it is not there.
    """
    fd = os.open(partial, _LOOK)
    try:
        _lock(fd)
        yield
    finally:
        os.close(fd)


def publish(partial: Path, path: Path, *, replacing: bool = False) -> None:
    """Give a file that is whole its name, once the disk has all of it; only its owner may read it.

    :param replacing: take the place of a regular file that has the name by now.
    :raises Refused: something else has the name by now.
    :raises OSError: the disk is full, or broken; nothing has got the name.  Names ``path``.
    """
    with _told_of(path):
        fd = os.open(partial, _LOOK)
        try:
            os.fchmod(fd, MODE)
            os.fsync(fd)
        finally:
            os.close(fd)
        give_name(partial, path, replacing=replacing)


def write_whole(path: Path, data: bytes, *, replacing: bool = True) -> None:
    """Write a file; see :class:`WholeFile` and its :meth:`~WholeFile.publish`."""
    with WholeFile(path) as file:
        file.write_at(0, data)
        file.publish(replacing=replacing)


def _stem(path: Path) -> str:
    """What the names beside ``path`` begin with: its own, or a shorter one that only it has."""
    raw = os.fsencode(path.name)
    if len(raw) <= _LONGEST_STEM_BYTES:
        return path.name
    import hashlib  # hardly ever needed, and dear to import

    digest = f"-{hashlib.blake2b(raw, digest_size=8).hexdigest()}"
    return os.fsdecode(raw[: _LONGEST_STEM_BYTES - len(digest)]) + digest


def _create(path: Path) -> tuple[Path, int]:
    while True:
        partial = partial_name(path)
        try:
            fd = os.open(partial, _CREATE, MODE)
        except FileExistsError:
            continue
        # Another writer may have taken it for a dead one's, before it was locked.
        if _lock(fd) is not False and _is_there(partial, fd):
            return partial, fd
        os.close(fd)


def _lock(fd: int) -> bool | None:
    """Whether it is locked by us now; None: files cannot be locked there."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_there(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _remove_dead(folder: Path, stem: str | None) -> None:
    # What cannot be listed or removed is not in the way: its name is never used again.
    with contextlib.suppress(OSError):
        for each in folder.iterdir():
            found = _PARTIAL.fullmatch(each.name)
            if found is not None and stem in {None, found[1]}:
                _remove_if_dead(each)


def _remove_if_dead(partial: Path) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(partial, _LOOK)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode) and _lock(fd):
                partial.unlink()
        finally:
            os.close(fd)


def _give_free_name(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except OSError as failure:
        taken = failure.errno == errno.EEXIST or os.path.lexists(path)
        if taken:
            raise Refused(f"{path} exists; remove it, or give another path") from failure
        if failure.errno not in _NO_LINKS:
            raise
        partial.rename(path)
    else:
        with contextlib.suppress(OSError):  # a second name of it is harmless
            partial.unlink()


def _sync_folder(folder: Path) -> None:
    """Make sure that a new name survives a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Errors are about the name that was asked for, not about what stands beside it."""
    try:
        yield
    except OSError as failure:
        raise OSError(failure.errno, failure.strerror, str(path)) from failure
