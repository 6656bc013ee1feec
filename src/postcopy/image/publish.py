"""Files appear under their name whole, or not at all; and only their owner may read them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from postcopy.channel.address import FileAddress
from postcopy.channel.claim import claimed
from postcopy.channel.partial_file import remove_partial
from postcopy.errors import Refused

PARTIAL: Final = ".partial"
MODE: Final = 0o600  # guest memory holds keys and passwords


def partial(path: Path) -> Path:
    """Where a file is while it is being written."""
    return path.with_name(path.name + PARTIAL)


def anew(path: Path) -> Path:
    """Where a file is while it is being written a second time, in another form."""
    return partial(path.with_name(path.name + ".anew"))


def check_free(path: Path) -> None:
    """Refuse a name under which nothing can be published.

    :raises Refused: it is taken, or there is no such folder.
    """
    if path.exists():
        raise Refused(f"{path} exists; remove it, or give another path")
    if not path.parent.is_dir():
        raise Refused(f"{path.parent} is no folder; make it, or give another path")


@contextlib.contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Hold a name that is free, for one image; nothing half-written is there, first or last.

    :raises Refused: it is not free, or somebody is writing an image for it.
    :raises OSError: nothing can be written there.
    """
    check_free(path)
    with claimed(path):
        check_free(path)  # it may have been published meanwhile
        with claimed(partial(path)):
            pass  # else a machine is still writing there, for somebody who has gone
        discard(path)
        try:
            yield
        finally:
            discard(path)


def discard(path: Path) -> None:
    """Take away what somebody has left half-written; harmless when there is nothing.

    For who has claimed the name, but for what a machine is still writing there for nobody.
    """
    remove_partial(FileAddress(str(partial(path))))
    for each in (partial(path), anew(path)):
        with contextlib.suppress(OSError):  # whoever writes there next says what is wrong
            each.unlink(missing_ok=True)


def publish(path: Path) -> None:
    """Give the file at :func:`partial` its name, once all of it is on the disk.

    :raises OSError: the disk is full, or broken; nothing has got the name.
    """
    written = partial(path)
    fd = os.open(written, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(fd, MODE)
        os.fsync(fd)
    finally:
        os.close(fd)
    written.replace(path)
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, and put it in the place of one that has the name.

    :raises OSError: as :func:`publish`; nothing is left behind.
    """
    written = partial(path)
    with removed_on_error(written):
        fd = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, MODE)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        publish(path)


def sync_folder(folder: Path) -> None:
    """Make sure that a new name survives a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Leave nothing half-written behind."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
