"""Open a channel to where a migration goes."""

import fcntl
import os
import socket
import stat

from postcopy.channel.address import (
    Address,
    ExecAddress,
    FdAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
)
from postcopy.channel.channel import Channel
from postcopy.channel.descriptors import DescriptorChannel
from postcopy.channel.exec_command import CommandChannel
from postcopy.channel.files import FileChannel
from postcopy.channel.sockets import SocketChannel
from postcopy.errors import CannotConnect
from postcopy.kernel.patience import persist

SocketName = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
"""An Internet address as :mod:`socket` writes it, see getaddrinfo(3)."""


def connect(address: Address, *, timeout_s: float | None = None) -> Channel:
    """Open a channel for sending; a file is created or cut off, from its offset on.

    :param timeout_s: how long a host may take to answer; None: as long as the kernel tries.
    :raises CannotConnect: no listener, no such file, no permission; the text is QEMU's.
    :raises Refused: a descriptor's name that has not been resolved.
    """
    if isinstance(address, TcpAddress):
        return _connect_tcp(address, timeout_s)
    if isinstance(address, UnixAddress):
        return _connect_unix(address, timeout_s)
    if isinstance(address, FileAddress):
        return _create_file(address)
    if isinstance(address, FdAddress):
        return open_descriptor(address)
    return start_command(address)


def resolve(address: TcpAddress, flags: int = 0) -> list[tuple[int, SocketName]]:
    """What the host's name stands for: (family, socket address), in the resolver's order.

    :raises OSError: it stands for nothing; ``strerror`` is QEMU's whole sentence.
    """
    try:
        found = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=flags
        )
    except OSError as failure:  # gaierror is one
        name = f"{address.host}:{address.port}"
        text = f"address resolution failed for {name}: {failure.strerror}"
        raise OSError(failure.errno, text) from failure
    except UnicodeError as failure:  # a name that no resolver can be asked for
        raise OSError(None, f"address resolution failed for {address.host}: {failure}") from failure
    return [(int(family), where) for family, _, _, _, where in found]


def open_descriptor(address: FdAddress) -> Channel:
    """A channel over a descriptor of this process, a socket or not; the channel owns it.

    :raises CannotConnect: no such descriptor.
    :raises Refused: it is a name that has not been resolved.
    """
    number = address.number
    try:
        mode = os.fstat(number).st_mode
        if stat.S_ISSOCK(mode):
            return SocketChannel(socket.socket(fileno=number), str(address))
        access = os.O_ACCMODE & fcntl.fcntl(number, fcntl.F_GETFL)
        return DescriptorChannel(
            str(address),
            reading=None if access == os.O_WRONLY else number,
            writing=None if access == os.O_RDONLY else number,
        )
    except OSError as failure:
        raise CannotConnect(f"Invalid file descriptor {number}: {failure.strerror}") from failure


def start_command(address: ExecAddress) -> Channel:
    """A channel to a shell command.

    :raises CannotConnect: it could not be started.
    """
    try:
        return CommandChannel(address)
    except OSError as failure:
        raise CannotConnect(f"Failed to start '{address}': {failure.strerror}") from failure


def _connect_tcp(address: TcpAddress, timeout_s: float | None) -> Channel:
    try:
        candidates = resolve(address)
    except OSError as failure:
        raise CannotConnect(str(failure.strerror)) from failure
    refusal: OSError | None = None
    for family, where in candidates:
        try:
            return SocketChannel(persist(_connected, family, where, timeout_s), str(address))
        except OSError as failure:
            refusal = failure
    raise _cannot(f"{address.host}:{address.port}", refusal) from refusal


def _connect_unix(address: UnixAddress, timeout_s: float | None) -> Channel:
    try:
        connected = persist(_connected, socket.AF_UNIX, address.path, timeout_s)
    except OSError as failure:
        raise _cannot(address.path, failure) from failure
    return SocketChannel(connected, str(address))


def _connected(family: int, where: SocketName | str, timeout_s: float | None) -> socket.socket:
    fresh = socket.socket(family, socket.SOCK_STREAM)
    try:
        fresh.settimeout(timeout_s)
        fresh.connect(where)
    except BaseException:
        fresh.close()
        raise
    return fresh


def _cannot(where: str, failure: OSError | None) -> CannotConnect:
    is_late = isinstance(failure, TimeoutError)
    reason = "Connection timed out" if is_late else failure and failure.strerror
    return CannotConnect(f"Failed to connect to '{where}': {reason or 'no address'}")


def _create_file(address: FileAddress) -> Channel:
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        fd = persist(os.open, address.path, flags, 0o600)
    except OSError as failure:
        raise CannotConnect(f"Could not open '{address.path}': {failure.strerror}") from failure
    try:
        # A device or a FIFO has no size to cut; what stands before the offset is not ours.
        if stat.S_ISREG(os.fstat(fd).st_mode):
            persist(os.ftruncate, fd, address.offset)
        return _channel(address, fd, writable=True)
    except OSError as failure:
        os.close(fd)
        text = f"failed to truncate migration file to offset {address.offset:#x}"
        raise CannotConnect(f"{text}: {failure.strerror}") from failure


def open_file(address: FileAddress) -> Channel:
    """A channel that reads a file from its offset on.

    :raises CannotConnect: no such file, or no permission.
    """
    try:
        # To open a FIFO must not wait for a writer: to read from it does, and can be given up.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        fd = persist(os.open, address.path, flags)
    except OSError as failure:
        raise CannotConnect(f"Could not open '{address.path}': {failure.strerror}") from failure
    try:
        return _channel(address, fd, writable=False)
    except OSError as failure:
        os.close(fd)
        text = f"Could not go to byte {address.offset:#x} of '{address.path}'"
        raise CannotConnect(f"{text}: {failure.strerror}") from failure


def _channel(address: FileAddress, fd: int, *, writable: bool) -> Channel:
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return FileChannel(str(address), fd, address.offset, writable=writable)
    if address.offset:
        os.lseek(fd, address.offset, os.SEEK_SET)
    end = {"writing" if writable else "reading": fd}
    return DescriptorChannel(str(address), **end)
