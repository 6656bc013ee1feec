"""Wait for channels from where a migration comes."""

import contextlib
import errno
import os
import select
import socket
import stat
import threading
from pathlib import Path
from typing import Self

from postcopy.channel.address import (
    Address,
    FdAddress,
    FileAddress,
    SocketPath,
    TcpAddress,
    UnixAddress,
)
from postcopy.channel.channel import Channel
from postcopy.channel.connect import (
    SocketName,
    open_descriptor,
    open_file,
    resolve,
    start_command,
)
from postcopy.channel.sockets import SocketChannel
from postcopy.errors import CannotConnect, CannotListen, ChannelBroken, KernelError
from postcopy.kernel import calls
from postcopy.kernel.patience import PASSES, Patience, persist

BACKLOG = 16
"""Connections that may wait to be accepted: a main channel, a preempt channel, retries."""


class Listener:
    """Listens at once; ``accept`` then gives one channel after the other.

    A file, a command or a connected descriptor gives one channel, and then no other comes.

    :raises CannotListen: the address is taken, or not ours; the text is QEMU's.
    :raises Refused: a descriptor's name that has not been resolved.
    """

    def __init__(self, address: Address) -> None:
        self._accepting = threading.Lock()
        self._ending = threading.Lock()
        self._is_closed = False
        self._door = _open_door(address)
        self._single = None if self._door else _open_single(address)
        self._address = address
        # Closing never removes the socket of a process that listens there after us.
        self._path = SocketPath(address.path) if isinstance(address, UnixAddress) else None
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        try:
            self._woken = calls.of_python("eventfd", "", os.eventfd, 0, flags)
        except BaseException:
            self._let_go()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def addresses(self) -> list[Address]:
        """Where it can be reached, with the port that the kernel chose; empty once closed."""
        if self._is_closed:
            return []
        if self._door is not None and self._door.family in (socket.AF_INET, socket.AF_INET6):
            host, port = self._door.getsockname()[:2]
            return [TcpAddress(host, port)]
        return [self._address]

    def described(self) -> list[dict[str, object]]:
        """These addresses as QAPI has them."""
        addresses = (address.to_qapi() for address in self.addresses)
        return [address for address in addresses if address is not None]

    def accept(self, timeout_s: float | None = None) -> Channel:
        """The next channel.

        :param timeout_s: how long to wait for it; None: for ever.
        :raises TimeoutError: no peer connected.
        :raises ChannelBroken: the listener was closed, before or meanwhile.
        :raises KernelError: no connection can be taken, for want of descriptors for example.
        """
        waits = Patience(PASSES - {errno.EAGAIN})
        with self._accepting:
            if self._is_closed:
                raise ChannelBroken(f"{self._address}: no longer listened on")
            if self._single is not None:
                channel, self._single = self._single, None
                return channel
            while True:
                self._wait(timeout_s)
                try:
                    return self._accepted()
                except (BlockingIOError, ConnectionAbortedError):
                    continue  # the peer is gone
                except OSError as failure:
                    if not waits.outlives(failure.errno or 0):
                        raise KernelError(
                            "accept", failure.errno or 0, str(self._address)
                        ) from failure

    def close(self) -> None:
        """Stop listening, and wake a thread that waits in ``accept``.  Any number of times."""
        with self._ending:
            if self._is_closed:
                return
            self._is_closed = True
            os.eventfd_write(self._woken, 1)
        with self._accepting:
            os.close(self._woken)
            self._let_go()

    def _let_go(self) -> None:
        if self._single is not None:
            self._single.shutdown()
            self._single.close()
        if self._door is not None:
            self._door.close()
        if self._path is not None:
            self._path.remove()

    def _wait(self, timeout_s: float | None) -> None:
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if self._door is not None:
            poll.register(self._door, select.POLLIN)
        timeout_ms = None if timeout_s is None else timeout_s * 1000
        ready = [fd for fd, _ in calls.of_python("poll", "", poll.poll, timeout_ms)]
        if self._woken in ready:
            raise ChannelBroken(f"{self._address}: no longer listened on")
        if not ready:
            raise TimeoutError(f"{self._address}: no peer connected within {timeout_s} s")

    def _accepted(self) -> Channel:
        assert self._door is not None
        connected, peer = self._door.accept()
        if self._door.family in (socket.AF_INET, socket.AF_INET6):
            return SocketChannel(connected, str(TcpAddress(peer[0], peer[1])))
        return SocketChannel(connected, str(self._address))


def _open_door(address: Address) -> socket.socket | None:
    """A listening socket, or None where there is nothing to listen on."""
    door = None
    if isinstance(address, TcpAddress):
        door = _listen_tcp(address)
    elif isinstance(address, UnixAddress):
        door = _listen_unix(address)
    elif isinstance(address, FdAddress) and _is_listening(address.number):
        door = socket.socket(fileno=address.number)
    if door is not None:
        # A connection that was aborted between poll and accept must not make accept wait.
        door.settimeout(0)
    return door


def _is_listening(number: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return False
        with socket.socket(fileno=os.dup(number)) as peek:
            return bool(peek.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as failure:
        raise CannotListen(f"Invalid file descriptor {number}: {failure.strerror}") from failure


def _open_single(address: Address) -> Channel:
    try:
        if isinstance(address, FileAddress):
            return open_file(address)
        if isinstance(address, FdAddress):
            return open_descriptor(address)
        assert not isinstance(address, TcpAddress | UnixAddress)
        return start_command(address)
    except CannotConnect as failure:
        raise CannotListen(str(failure)) from failure


def _listen_tcp(address: TcpAddress) -> socket.socket:
    if not address.host and socket.has_dualstack_ipv6():
        candidates: list[tuple[int, SocketName]] = [(int(socket.AF_INET6), ("::", address.port))]
    else:
        try:
            candidates = resolve(address, socket.AI_PASSIVE)
        except OSError as failure:
            raise CannotListen(str(failure.strerror)) from failure
    refusal: OSError | None = None
    for family, where in candidates:
        try:
            return persist(_bound, family, where)
        except OSError as failure:
            refusal = failure
    is_taken = isinstance(refusal, OSError) and refusal.errno == errno.EADDRINUSE
    what = "Failed to find an available port" if is_taken else "Failed to bind socket"
    raise CannotListen(f"{what}: {refusal.strerror if refusal else 'no address'}") from refusal


def _listen_unix(address: UnixAddress) -> socket.socket:
    try:
        # As QEMU does: what a listener that is gone has left behind is no obstacle.  A file that
        # is not a socket stays.
        with contextlib.suppress(FileNotFoundError):
            if Path(address.path).is_socket():
                Path(address.path).unlink()
        return persist(_bound, socket.AF_UNIX, address.path)
    except OSError as failure:
        text = f"Failed to bind socket to {address.path}: {failure.strerror}"
        raise CannotListen(text) from failure


def _bound(family: int, where: SocketName | str) -> socket.socket:
    door = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            # An address in TIME_WAIT is free; one that is listened on stays taken.
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            door.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        door.bind(where)
        door.listen(BACKLOG)
    except BaseException:
        door.close()
        raise
    return door
