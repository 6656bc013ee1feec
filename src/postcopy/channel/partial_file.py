"""A file that gets its name when it is whole: no half of it ever stands where a whole one is looked for."""

import os
import stat
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from postcopy.channel.address import Address, FileAddress
from postcopy.channel.claim import Claim, claimed
from postcopy.errors import CannotConnect, ChannelBroken, Refused

SUFFIX = ".partial"


class PartialFile:
    """What is to become the file at ``address``; where there is nothing to rename, nothing is done."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._partial: FileAddress | None = None
        self._claim: Claim | None = None

    def begin(self) -> Address:
        """Make room for it; return where to write.

        :raises CannotConnect: the name is taken by a folder, or nothing can be made beside it.
        :raises Refused: somebody else is writing it.
        """
        if not isinstance(self._address, FileAddress):
            return self._address
        path = self._address.path
        if Path(path).is_dir():
            raise CannotConnect(f"Could not open '{path}': Is a directory")
        partial = _partial_of(self._address)
        if partial is None:
            return self._address
        try:
            self._claim = Claim(path)
        except OSError as failure:
            raise CannotConnect(f"Could not open '{path}': {failure.strerror}") from failure
        self._partial = partial
        _unlink(partial)  # or it would keep the rights that it was made with
        return partial

    def publish(self, fd: int) -> None:
        """Give the whole file its name, once the disk has it.

        :param fd: the partial file, open.
        :raises ChannelBroken: the disk did not take all of it, or the name cannot be given.
        """
        if self._partial is None or not isinstance(self._address, FileAddress):
            return
        try:
            os.fsync(fd)
            Path(self._partial.path).replace(self._address.path)
        except OSError as failure:
            raise ChannelBroken(f"{self._address}: {failure.strerror}") from failure

    def end(self) -> None:
        """Let others write, and leave nothing half-written; any number of times."""
        if self._partial is not None and self._claim is not None:
            _unlink(self._partial)
            self._claim.release()
        self._partial = None


def remove_partial(address: Address) -> None:
    """Take away what a dead process has left half-written; harmless when there is nothing.

    What somebody is writing stays.
    """
    partial = _partial_of(address)
    if partial is None or not isinstance(address, FileAddress):
        return
    with suppress(OSError, Refused), claimed(address.path):
        _unlink(partial)


def _partial_of(address: Address) -> FileAddress | None:
    """Where to write what is to become the file at ``address``.

    :return: None where there is nothing to rename: no file, something else by that name (a device, a
        FIFO), or a file in which others have the bytes before the offset.
    """
    if not isinstance(address, FileAddress) or address.offset:
        return None
    with suppress(OSError):
        if not stat.S_ISREG(Path(address.path).stat().st_mode):
            return None
    return replace(address, path=address.path + SUFFIX)


def _unlink(partial: FileAddress) -> None:
    with suppress(OSError):
        Path(partial.path).unlink()
