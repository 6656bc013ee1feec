"""A socket whose bytes are encrypted: the same channel as any other to its users.

Pages go through a buffer here: the kernel copies them from the guest's memory, which may lack one of them,
OpenSSL encrypts them, and the kernel takes the result.  The kernel's own TLS would save the two copies;
Python's :mod:`ssl` can switch it on from 3.12 on only, for sessions that own their socket.
"""

import errno
import mmap
import os
import select
import socket
import ssl
import time
from contextlib import suppress
from typing import Final

from postcopy.channel.channel import Channel
from postcopy.channel.sockets import SocketChannel
from postcopy.channel.tls_session import TlsCut, TlsFailure, TlsSession, context_for, failure
from postcopy.channel.writev import PendingPieces
from postcopy.errors import CannotConnect, ChannelBroken, Refused
from postcopy.kernel import calls, memfd
from postcopy.tls_options import TlsOptions

HANDSHAKE_S: Final = 4.0
"""How long a peer may take for its handshake, from its first byte to its last."""

_CHUNK_BYTES: Final = 256 << 10
"""How much is encrypted, or received, at once: small enough for the CPU's cache."""
_HANDSHAKE_BYTES: Final = 16 << 10
_MOST_HANDSHAKE_BYTES: Final = 256 << 10
_LAST_WORD_S: Final = 1.0
_NOT_TAKEN: Final = (
    "right after its handshake: the peer may refuse this side's certificate, as its log says"
)
_HANDSHAKE_RECORD: Final = 22
_ALERT_RECORD: Final = 21
_PROTOCOL_VERSION_ALERT: Final = bytes((_ALERT_RECORD, 3, 3, 0, 2, 2, 70))
"""Fatal, see RFC 8446, section 6."""


class TlsChannel(SocketChannel):
    """Takes over a connected socket and its session, whose handshake is done."""

    def __init__(self, connected: socket.socket, description: str, session: TlsSession) -> None:
        super().__init__(connected, description)
        self._session = session
        self._fd = memfd.create_sealed("tls", _CHUNK_BYTES)
        self._plain = mmap.mmap(self._fd, _CHUNK_BYTES)
        self._received = memoryview(bytearray(_CHUNK_BYTES))
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self._more = calls.of_python("eventfd", "", os.eventfd, 0, flags)
        self._says_more = False  # under `_receiving`

    @property
    def encrypted(self) -> bool:
        """True."""
        return True

    @property
    def input_fds(self) -> tuple[int, ...]:
        """The socket, and a descriptor that is readable while decrypted bytes are left."""
        return self.fileno(), self._more

    def receive_ready_into(self, view: memoryview) -> int | None:
        """See :meth:`Channel.receive_ready_into`: a record may have come in part, or be about keys."""
        with self._receiving:
            try:
                count = self._receive_now(view)
            except BlockingIOError:
                return None
            except (OSError, ValueError) as broken:
                raise self._broken(broken) from broken
            if count is not None:
                if not count and self._shut:
                    raise self._broken(None)
                self.received_bytes += count
            return count

    def close(self) -> None:
        """See :meth:`Channel.close`; the peer is told that the stream has ended, unless it was broken."""
        if not self._aborted and not self._closed and self._sending.acquire(blocking=False):
            try:
                self._say_end()
            finally:
                self._sending.release()
        super().close()

    def _say_end(self) -> None:
        left = memoryview(self._session.close_notify())
        poll = select.poll()
        with suppress(OSError, ValueError):
            poll.register(self._socket, select.POLLOUT)
            while left and poll.poll(_LAST_WORD_S * 1000):
                left = left[self._socket.send(left, socket.MSG_DONTWAIT) :]

    # --- what goes out

    def _send_some(self, pieces: list[memoryview]) -> int:
        return self._send_copied(os.pwritev(self._fd, pieces, 0))

    def _gather_some(self, left: PendingPieces) -> int:
        return self._send_copied(left.write_at(self._fd, 0))  # which stops at the end of the buffer

    def _send_copied(self, n_bytes: int) -> int:
        with memoryview(self._plain) as plain, plain[:n_bytes] as part:
            left = memoryview(self._session.encrypt(part))
        try:
            while left:
                left = left[self._persist(self._socket.send, left) :]
        except OSError as broken:
            # A part of a record may be gone: nothing can follow, and no call is made again.
            self._aborted = True
            raise ConnectionAbortedError(errno.ECONNABORTED, broken.strerror) from broken
        return n_bytes

    # --- what comes in

    def _receive_some(self, view: memoryview) -> int:
        while (count := self._decrypt(view)) is None:
            self._feed(self._socket.recv_into(self._received))
        return count

    def _receive_some_of(self, views: list[memoryview]) -> int:
        return self._receive_some(views[0])

    def _receive_now(self, view: memoryview) -> int | None:
        if (count := self._decrypt(view)) is not None:
            return count
        self._feed(self._socket.recv_into(self._received, 0, socket.MSG_DONTWAIT))
        return self._decrypt(view)

    def _feed(self, n_bytes: int) -> None:
        with self._received[:n_bytes] as part:
            self._session.feed(part)

    def _decrypt(self, view: memoryview) -> int | None:
        """Return how many bytes; 0 = end, None = more has to come."""
        try:
            count = self._session.decrypt_into(view)
        except TlsCut:
            if not self.received_bytes:
                raise TlsCut(_NOT_TAKEN) from None
            raise
        more = count == len(view) and self._session.has_more
        if more != self._says_more:
            self._says_more = more
            (os.eventfd_write(self._more, 1) if more else os.eventfd_read(self._more))
        return count if count or self._session.ended else None

    def _close(self) -> None:
        super()._close()
        self._plain.close()
        os.close(self._fd)
        os.close(self._more)


def secure(channel: Channel, options: TlsOptions, host: str = "") -> TlsChannel:
    """Encrypt a connection from its first byte on; closes it when that fails.

    :param host: the name by which a source has reached the destination.
    :raises CannotConnect: the peer is refused, refuses this side, or speaks no TLS.
    :raises Refused: a certificate or key of this side cannot be used, or the channel is no socket.
    """
    try:
        connected = _socket_of(channel)
        session = _session(options, host, channel.description)
        try:
            _shake_hands(connected, session, time.monotonic() + HANDSHAKE_S)
            _authorize(session, options)
        except OSError as broken:
            raise CannotConnect(
                f"{channel.description}: TLS handshake failed: {broken.strerror or broken}"
            ) from broken
        return TlsChannel(connected.detach(), channel.description, session)
    except BaseException:
        channel.close()
        raise


def _socket_of(channel: Channel) -> SocketChannel:
    if not isinstance(channel, SocketChannel):
        raise Refused(
            f"tls-creds is set, and {channel.description} is no socket; use tcp:, unix: or fd:"
        )
    return channel


def _session(options: TlsOptions, host: str, description: str) -> TlsSession:
    context = context_for(options)
    if options.is_server:
        return TlsSession(context, None)
    name = options.hostname or host
    if not name and options.verify_peer:
        raise Refused(
            f"{description} has no host name to check the destination's certificate against; "
            "set tls-hostname"
        )
    try:
        return TlsSession(context, name)
    except (ValueError, UnicodeError) as error:
        raise Refused(f"tls-hostname '{name}' is no host name: {error}") from error


def _shake_hands(channel: SocketChannel, session: TlsSession, until: float) -> None:
    """Do the handshake.

    :raises OSError: it fails, or takes too long.
    """
    received_bytes = 0
    buffer = memoryview(bytearray(_HANDSHAKE_BYTES))
    while True:
        try:
            out, done = session.handshake()
        except ssl.SSLError as error:
            _send(channel, session.unsent())
            raise failure(error) from error
        _send(channel, out)
        if done:
            return
        count = _receive_by(channel, buffer, until)
        if not received_bytes and count and buffer[0] not in {_HANDSHAKE_RECORD, _ALERT_RECORD}:
            _send(channel, _PROTOCOL_VERSION_ALERT)  # which OpenSSL does not send then
            raise TlsFailure("the peer speaks no TLS; set tls-creds there too, or clear it here")
        if not count:
            raise TlsFailure(
                "the peer closed the connection; see that tls-creds is set there, and its log"
            )
        received_bytes += count
        if received_bytes > _MOST_HANDSHAKE_BYTES:
            raise TlsFailure(f"it is longer than {_MOST_HANDSHAKE_BYTES} bytes")
        session.feed(buffer[:count])


def _receive_by(channel: SocketChannel, buffer: memoryview, until: float) -> int:
    _wait_for_input(channel, until)
    try:
        return channel.receive_into(buffer)
    except ChannelBroken:
        return 0


def _send(channel: SocketChannel, data: bytes) -> None:
    """Send what a fresh socket has room for."""
    with suppress(ChannelBroken):  # what the peer has said before comes first
        channel.send(data)


def _wait_for_input(channel: SocketChannel, until: float) -> None:
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
        raise TlsFailure(
            f"the peer took longer than {HANDSHAKE_S:g} s; see that tls-creds is set there"
        )


def _authorize(session: TlsSession, options: TlsOptions) -> None:
    """Refuse a source that the authorization does not name, in QEMU's words.

    :raises TlsFailure: it is such a source.
    """
    if options.authorization is None:
        return
    certificate = session.peer_certificate()
    name = distinguished_name(certificate) if certificate is not None else "no certificate"
    if certificate is None or not options.authorization.allows(name):
        raise TlsFailure(f"TLS x509 authz check for {name} is denied")


def distinguished_name(certificate: bytes) -> str:
    """The subject of a certificate as RFC 4514 writes it: ``CN=host,O=Example``.

    :param certificate: in DER.
    """
    from cryptography import x509  # takes long to import

    return x509.load_der_x509_certificate(certificate).subject.rfc4514_string()
