"""Sending from where the bytes lie, without a copy into the kernel: ``MSG_ZEROCOPY``.

The kernel numbers the calls of a socket, and tells in its error queue which of them are over: until then it
may still read the memory.  What it could not send so it has copied, and says that, too: always on the
loopback device, and where the network card cannot gather.  See Linux' ``networking/msg_zerocopy.rst``.
"""

import errno
import os
import select
import socket
import struct
from typing import Final

from postcopy.abi import linux
from postcopy.channel.writev import PendingPieces
from postcopy.errors import ChannelBroken, HostCannot

_NOTICE: Final = struct.Struct("=I4B2I")
"""``struct sock_extended_err``: errno, origin, type, code, padding, and the first and last call."""
_ROOM_BYTES: Final = 128


class ZeroCopy:
    """What one TCP socket still has to send.  One thread at a time.

    :param description: the peer, as it stands in errors.
    :raises HostCannot: this kernel, or this kind of socket, cannot send so.
    """

    def __init__(self, connected: socket.socket, description: str) -> None:
        self._socket = connected
        self._description = description
        self._sent = 0  # calls, which the kernel numbers from 0
        self._done = 0  # all before this one are over
        self._ahead: dict[
            int, int
        ] = {}  # further ones that are over: the first, and what follows the last
        self._any_uncopied = False
        self._finished = 0
        try:
            connected.setsockopt(socket.SOL_SOCKET, linux.SO_ZEROCOPY, 1)
        except OSError as failure:
            raise HostCannot(
                f"{description}: Zero copy send feature not detected in host kernel",
                "switch zero-copy-send off",
            ) from failure

    def write(self, left: PendingPieces) -> int:
        """Send one byte or more, in one call; return how many.

        The memory may be read until :meth:`finish`.

        :raises OSError: as :func:`os.writev`.
        :raises ChannelBroken: not even one call's memory can be locked.
        """
        while True:
            self._look()
            try:
                sent_bytes = left.send(self._socket.fileno(), linux.MSG_ZEROCOPY)
            except OSError as failure:
                # Too many calls are under way, or too much memory is locked for them.
                if failure.errno != errno.ENOBUFS:
                    raise
                if self._done == self._sent:
                    raise ChannelBroken(
                        f"{self._description}: Process can't lock enough memory for using MSG_ZEROCOPY; "
                        "raise the limit of locked memory (ulimit -l), or switch zero-copy-send off"
                    ) from failure
                self._wait()
                continue
            self._sent += 1
            return sent_bytes

    def finish(self) -> bool:
        """Wait until the kernel reads nothing of what was sent any more.

        :return: whether it has copied all of what was sent since the last time.
        :raises OSError: the connection has broken before.
        """
        while self._done < self._sent:
            self._wait()
        missed = self._finished < self._sent and not self._any_uncopied
        self._finished, self._any_uncopied = self._sent, False
        return missed

    def _wait(self) -> None:
        """Wait for a notice.

        :raises OSError: the connection has broken, and no notice is left.
        """
        if self._look():
            return
        poll = select.poll()
        poll.register(self._socket.fileno(), 0)  # errors are told all the same
        ((_, events),) = poll.poll()
        if self._look():
            return
        error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error or events & select.POLLHUP:
            error = error or errno.ECONNRESET
            raise OSError(error, os.strerror(error))

    def _look(self) -> bool:
        """Take the notices that are there; return whether there were any."""
        found = False
        while self._done < self._sent:
            try:
                _, told, _, _ = self._socket.recvmsg(1, _ROOM_BYTES, socket.MSG_ERRQUEUE)
            except BlockingIOError:
                break
            for _, _, data in told:
                self._take(data)
                found = True
        return found

    def _take(self, data: bytes) -> None:
        _, origin, _, code, _, first, last = _NOTICE.unpack_from(data)
        if origin != linux.SO_EE_ORIGIN_ZEROCOPY:
            return
        self._any_uncopied |= code != linux.SO_EE_CODE_ZEROCOPY_COPIED
        self._ahead[first] = last + 1
        while (end := self._ahead.pop(self._done, None)) is not None:
            self._done = end
