"""A file that gets its name when it is whole: no half of it ever stands where a whole one is looked for."""

import os
import stat
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from postcopy.channel.address import Address, FileAddress
from postcopy.errors import CannotConnect, ChannelBroken

SUFFIX = ".partial"


def partial_of(address: Address) -> FileAddress | None:
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


def remove_partial(address: Address) -> None:
    """Take away what somebody has left half-written; harmless when there is nothing."""
    partial = partial_of(address)
    if partial is not None:
        with suppress(OSError):
            Path(partial.path).unlink()


def begin_partial(address: Address) -> Address:
    """Make room for a partial file; return where to write.

    :raises CannotConnect: the name is taken by a folder.
    """
    if isinstance(address, FileAddress) and Path(address.path).is_dir():
        raise CannotConnect(f"Could not open '{address.path}': Is a directory")
    remove_partial(address)  # or it would keep the rights that it was made with
    return partial_of(address) or address


def publish(address: Address, fd: int) -> None:
    """Give the whole file its name, once the disk has it.

    :param fd: the partial file, open.
    :raises ChannelBroken: the disk did not take all of it, or the name cannot be given.
    """
    partial = partial_of(address)
    if partial is None or not isinstance(address, FileAddress):
        return
    try:
        os.fsync(fd)
        Path(partial.path).replace(address.path)
    except OSError as failure:
        raise ChannelBroken(f"{address}: {failure.strerror}") from failure
