"""A channel over a connected stream socket, TCP or Unix."""

import array
import fcntl
import socket
import sys
import termios

from postcopy.channel.channel import Channel
from postcopy.channel.writev import PendingPieces
from postcopy.channel.zero_copy import ZeroCopy

_RTT_OFFSET = 68  # of tcpi_rtt in struct tcp_info, microseconds
_NEAR_S = 0.001
_FAST_LINK = 1.25e9  # bytes a second: ten gigabits
_MOST_BUFFERED = 4 << 20

KEEPALIVE_PROBES = 3
"""How many unanswered probes make up the silence after which TCP gives up."""


class SocketChannel(Channel):
    """Takes over a connected, blocking stream socket.

    :param connected: the socket; the channel owns it from here.
    :param description: the peer, as it stands in errors.
    """

    def __init__(self, connected: socket.socket, description: str) -> None:
        super().__init__(description)
        self._socket = connected
        self._zero_copy: ZeroCopy | None = None
        self._is_tcp = connected.family in (socket.AF_INET, socket.AF_INET6)
        connected.settimeout(None)
        if self._is_tcp:
            # A page request must not wait until there is more to send.
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def can_return(self) -> bool:
        """Every socket goes both ways."""
        return True

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def detach(self) -> socket.socket:
        """Give the socket away; this channel is closed then, and the socket is not."""
        with self._sending, self._receiving, self._ending:
            self._closed = True
            return socket.socket(fileno=self._socket.detach())

    def send_uncopied(self) -> None:
        """Let :meth:`send_gathered` copy nothing from now on.

        Its memory has to stay until :meth:`finish_uncopied` returns.

        :raises HostCannot: this host, or this kind of socket, can send nothing so.
        """
        self._zero_copy = ZeroCopy(self._socket, self.description)

    def finish_uncopied(self) -> bool:
        """Wait until nothing of what was sent uncopied is read any more.

        :return: whether the kernel has copied all of it since the last time, because it had to.
        :raises ChannelBroken: the peer is gone, or ``shutdown`` was called.
        """
        assert self._zero_copy is not None
        with self._sending:
            try:
                return self._zero_copy.finish()
            except (OSError, ValueError) as failure:
                raise self._broken(failure) from failure

    def bound_buffers(self, n_bytes: int) -> None:
        """See :meth:`Channel.bound_buffers`; the kernel doubles it for its own book-keeping.

        With a long round trip the bound is what a fast link has in flight, or it would slow the link down.
        The unsent bytes here are bounded to half of that.
        """
        if self._is_tcp:
            # What is sent now waits for that on a slow way; see tcp(7) and Linux' ip-sysctl.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, n_bytes // 2)
        far_s = self._round_trip_s() - _NEAR_S
        n_bytes = max(n_bytes, min(int(far_s * _FAST_LINK), _MOST_BUFFERED))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, n_bytes)
        if self._is_tcp:
            # Not SO_RCVBUF: what the peer has sent into a buffer that shrinks is dropped, and comes
            # again a fifth of a second later.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, n_bytes)
        else:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, n_bytes)

    def _round_trip_s(self) -> float:
        """TCP's own estimate; 0 on other sockets.  See tcp(7), TCP_INFO."""
        if not self._is_tcp:
            return 0.0
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT_OFFSET + 4)
        except OSError:
            return 0.0
        return int.from_bytes(info[_RTT_OFFSET:], sys.byteorder) / 1e6

    def pending_output(self) -> int:
        """See :meth:`Channel.pending_output`; 0 once it is closed.  SIOCOUTQ, see tcp(7)."""
        count = array.array("i", [0])
        try:
            fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, count)
        except (OSError, ValueError):
            return 0
        return count[0]

    def watch(self, seconds: float) -> None:
        """See :meth:`Channel.watch`; both for an idle connection and for one with data to send."""
        if not self._is_tcp or not seconds:
            return
        probe_s = max(1, round(seconds / (KEEPALIVE_PROBES + 1)))
        for option, value in (
            (socket.TCP_KEEPIDLE, probe_s),
            (socket.TCP_KEEPINTVL, probe_s),
            (socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
            (socket.TCP_USER_TIMEOUT, max(1, int(seconds * 1000))),
        ):
            self._socket.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def _send_some(self, pieces: list[memoryview]) -> int:
        if len(pieces) == 1:
            return self._socket.send(pieces[0])
        return self._socket.sendmsg(pieces)

    def _gather_some(self, left: PendingPieces) -> int:
        if self._zero_copy is not None:
            return self._zero_copy.write(left)
        return left.write(self._socket.fileno())

    def _receive_some(self, view: memoryview) -> int:
        return self._socket.recv_into(view, 0, socket.MSG_WAITALL if self._waits_for_all else 0)

    def _receive_some_of(self, views: list[memoryview]) -> int:
        if len(views) == 1:
            return self._receive_some(views[0])
        return self._socket.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]

    def _wake(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # not connected any more: no thread can be waiting

    def _close(self) -> None:
        self._socket.close()
