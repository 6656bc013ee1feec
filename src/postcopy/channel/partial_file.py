"""The file of a migration that gets its name when it is whole: see :mod:`postcopy.channel.whole_file`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from postcopy.channel.address import Address, FileAddress
from postcopy.channel.path_lock import PathLock, path_locked
from postcopy.channel.whole_file import (
    Place,
    give_name,
    is_partial,
    look_at,
    partial_name,
    remove_leftovers,
)
from postcopy.errors import CannotConnect, ChannelBroken, Refused


class PartialFile:
    """What is to become the file at ``address``; where there is nothing to rename, nothing is done.

    A client that publishes the file itself gives a name of
    :func:`postcopy.channel.whole_file.partial_name`: what is written there keeps that name.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._partial: Path | None = None
        self._claim: PathLock | None = None

    def begin(self) -> Address:
        """Make room for it; return where to write.

        :raises CannotConnect: the name is taken by a folder, or nothing can be made beside it.
        :raises Refused: another process is writing it, or what has the name must stay.
        """
        address = self._address
        if not isinstance(address, FileAddress) or address.offset:
            return address  # others have the bytes before the offset
        path = Path(address.path)
        if is_partial(path):
            self._partial = path
            return address
        if path.is_dir():
            raise CannotConnect(f"Could not open '{address.path}': Is a directory")
        try:
            if look_at(path) is Place.DEVICE:
                return address
            self._claim = PathLock(path)
        except OSError as failure:
            raise CannotConnect(f"Could not open '{address.path}': {failure.strerror}") from failure
        remove_leftovers(path)
        self._partial = partial_name(path)
        return replace(address, path=str(self._partial))

    @property
    def ordinary(self) -> bool:
        """Whether what has begun is a file, and ours to remove."""
        return self._partial is not None

    def sync(self, fd: int) -> None:
        """Have the disk take all of it.

        :param fd: the partial file, open.
        :raises ChannelBroken: it does not.
        """
        if self._partial is not None:
            with self._broken_if_it_fails():
                os.fsync(fd)

    def publish(self) -> None:
        """Give the whole file its name.

        :raises ChannelBroken: the name cannot be given.
        :raises Refused: what has the name by now must stay.
        """
        if self._claim is not None and self._partial is not None:
            assert isinstance(self._address, FileAddress)
            with self._broken_if_it_fails():
                give_name(self._partial, Path(self._address.path), replacing=True)
        self._partial = None

    def end(self) -> None:
        """Let others write, and leave nothing half-written; any number of times."""
        partial, self._partial = self._partial, None
        if partial is not None:
            _unlink(partial)
        if self._claim is not None:
            self._claim.release()

    @contextmanager
    def _broken_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError as failure:
            raise ChannelBroken(f"{self._address}: {failure.strerror}") from failure


def remove_partial(address: Address) -> None:
    """Remove what a dead process has left half-written; harmless when there is nothing.

    What is being written stays.
    """
    if not isinstance(address, FileAddress) or address.offset:
        return
    path = Path(address.path)
    if is_partial(path):
        _unlink(path)
        return
    with suppress(OSError, Refused), path_locked(path):
        remove_leftovers(path)


def _unlink(partial: Path) -> None:
    with suppress(OSError):
        partial.unlink()
