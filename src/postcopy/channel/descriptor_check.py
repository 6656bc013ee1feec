"""Descriptors that are given as addresses: whether one can carry a stream, asked before anything moves.

QEMU takes any descriptor and finds out by an input/output error, or waits for ever.
"""

import enum
import fcntl
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from postcopy.channel.address import Address, FdAddress, FileAddress, parse
from postcopy.errors import Refused, WrongState


class Use(enum.Enum):
    """What a descriptor is given for."""

    SEND = "written to"
    RECEIVE = "read from"


_LACKING = {Use.SEND: os.O_RDONLY, Use.RECEIVE: os.O_WRONLY}
"""The access mode that excludes it."""


def check_descriptor(number: int, use: Use) -> None:
    """Refuse a descriptor that cannot be used so.

    A listening socket can be received from: it gives connections.

    :raises Refused: there is none of that number, or it is none that a stream can go through.
    """
    try:
        mode = os.fstat(number).st_mode
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
    except OSError as failure:
        raise Refused(f"File descriptor named '{number}' has not been found") from failure
    if reason := _why_not(number, mode, flags, use):
        raise Refused(f"Invalid file descriptor {number}: {reason}")


def can_answer(number: int) -> bool:
    """Whether what is written to an open descriptor may be answered on it."""
    mode = os.fstat(number).st_mode
    if stat.S_ISSOCK(mode):
        return True
    access = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    # From a file, or a FIFO that is open both ways, only our own bytes would come back.
    return stat.S_ISCHR(mode) and access == os.O_RDWR


def _why_not(number: int, mode: int, flags: int, use: Use) -> str:
    if stat.S_ISDIR(mode):
        return "it is a directory"
    if flags & os.O_PATH:
        return "it was opened with O_PATH, so it can be neither read nor written"
    if stat.S_ISSOCK(mode):
        return _why_no_socket(number, use)
    if not any(
        is_kind(mode) for is_kind in (stat.S_ISREG, stat.S_ISFIFO, stat.S_ISCHR, stat.S_ISBLK)
    ):
        return "it is neither a socket nor a pipe, file or device"
    if flags & os.O_ACCMODE == _LACKING[use]:
        return f"it is not open to be {use.value}"
    return ""


def _why_no_socket(number: int, use: Use) -> str:
    with socket.socket(fileno=os.dup(number)) as given:
        if given.type != socket.SOCK_STREAM:
            return "it is a socket of another type than SOCK_STREAM"
        listens = given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listens and use is Use.RECEIVE:
            return ""
        try:
            given.getpeername()
        except OSError:
            return "it is a socket that is not connected"
    return ""


@contextmanager
def descriptors_for(address: Address, use: Use) -> Iterator[list[int]]:
    """The descriptors to send along with an address to another process: an ``fd:`` means one of ours.

    :raises Refused: it cannot be used so.
    """
    fds = []
    if isinstance(address, FdAddress):
        check_descriptor(address.number, use)
        fds = [_duplicate(address)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def _duplicate(address: FdAddress) -> int:
    try:
        return os.dup(address.number)
    except OSError as failure:
        raise Refused(f"{address} cannot be duplicated: {failure.strerror}") from failure


def received_uri(uri: str, fds: Sequence[int]) -> str:
    """An address that another process has sent: a descriptor that came along has a number of ours.

    :raises WrongState: the address is a descriptor, and none came along: the same number means another
        file here.
    """
    if not fds and isinstance(parse(uri), FdAddress):
        raise WrongState(
            f"what '{uri}' was has gone with the engine process that had it; use another address"
        )
    return f"fd:{fds[0]}" if fds else uri


def answers(address: Address) -> bool:
    """Whether something can come back from there."""
    if isinstance(address, FdAddress):
        return can_answer(address.number)
    return not isinstance(address, FileAddress)
