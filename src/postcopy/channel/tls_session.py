"""One TLS session without its socket: plain bytes to encrypted ones, and back.

Python's :mod:`ssl` reads QEMU's certificate files; at a QEMU's end of the wire there is GnuTLS.
"""

import errno
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

from postcopy.errors import Refused
from postcopy.tls_options import TlsOptions

CA_CERT: Final = "ca-cert.pem"
CA_CRL: Final = "ca-crl.pem"
DH_PARAMS: Final = "dh-params.pem"
SERVER_FILES: Final = ("server-cert.pem", "server-key.pem")
CLIENT_FILES: Final = ("client-cert.pem", "client-key.pem")
"""QEMU's names, see its ``docs/system/tls.rst``."""

_MOST_UNSENT_BYTES: Final = 64 << 10
"""Answers to the peer's key updates that wait for the next send; an honest peer causes a few hundred."""

_USABLE: Final = {"TLS1.2": ssl.TLSVersion.TLSv1_2, "TLS1.3": ssl.TLSVersion.TLSv1_3}
_NOT_USABLE: Final = frozenset({"TLS1.0", "TLS1.1"})
_LEVELS: Final = frozenset(
    {"NORMAL", "PERFORMANCE", "SECURE", "SECURE128", "SECURE192", "SECURE256", "@SYSTEM"}
)


class TlsFailure(OSError):
    """A session cannot begin or go on; ``strerror`` says why."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EPROTO, why)


class TlsCut(ConnectionResetError):
    """The stream ends without the peer's ``close_notify``: it was cut, and is not at its end."""

    def __init__(self, why: str = "without the close_notify that ends one") -> None:
        super().__init__(errno.ECONNRESET, f"the encrypted stream was cut, {why}")


def context_for(options: TlsOptions) -> ssl.SSLContext:
    """Read the certificates and keys of one side, as they are now.

    :raises Refused: a file is missing or wrong; names it.
    """
    side = ssl.PROTOCOL_TLS_SERVER if options.is_server else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(side)
    versions = _versions(options.priority)
    context.minimum_version, context.maximum_version = versions[0], versions[-1]
    context.options |= ssl.OP_NO_RENEGOTIATION
    folder = Path(options.directory)
    if options.is_server:
        context.num_tickets = 0  # no session is ever resumed
    else:
        context.check_hostname = options.verify_peer
    context.verify_mode = ssl.CERT_REQUIRED if options.verify_peer else ssl.CERT_NONE
    _load(folder / CA_CERT, context.load_verify_locations)
    if (folder / CA_CRL).exists():
        _load(folder / CA_CRL, context.load_verify_locations)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    _load_own(context, folder, options)
    return context


def _load_own(context: ssl.SSLContext, folder: Path, options: TlsOptions) -> None:
    """Load this side's certificate, which a client may go without."""
    certificate, key = (folder / n for n in (SERVER_FILES if options.is_server else CLIENT_FILES))
    if not options.is_server and not certificate.exists() and not key.exists():
        return

    def no_password() -> str:
        raise Refused(f"{key} is encrypted, and no password is asked for; decrypt it")

    _readable(key)
    _load(certificate, lambda path: context.load_cert_chain(path, key, no_password))
    if options.is_server and (folder / DH_PARAMS).exists():
        _load(folder / DH_PARAMS, context.load_dh_params)


def _load(path: Path, load: Callable[[str], None]) -> None:
    _readable(path)
    try:
        load(str(path))
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        raise Refused(f"{path}: unusable for TLS: {reason}; give another file") from error
    except OSError as error:
        raise Refused(f"Unable to access credentials {path}: {error.strerror}") from error


def _readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise Refused(f"Unable to access credentials {path}: {error.strerror}") from error


def _versions(priority: str) -> list[ssl.TLSVersion]:
    """The versions of TLS that a priority string of GnuTLS allows, in order.

    :raises Refused: it allows none, or asks for more than versions.
    """
    allowed = set(_USABLE)
    first, *changes = priority.split(":") if priority else ["NORMAL"]
    wrong = [first] if first.partition(",")[0] not in _LEVELS else []
    for change in changes:
        sign, version = change[:1], change[1:].removeprefix("VERS-")
        named = set(_USABLE) if version in {"ALL", "TLS-ALL"} else {version}
        is_version = change[1:].startswith("VERS-") and named <= {*_USABLE, *_NOT_USABLE}
        if not is_version or sign not in {"+", "-", "!"}:
            wrong.append(change)
        elif sign == "+":
            allowed |= named - _NOT_USABLE
        else:
            allowed -= named
    if wrong or not allowed:
        what = f"'{wrong[0]}'" if wrong else "a version of TLS that is left"
        raise Refused(
            f"priority '{priority}': OpenSSL has not {what}; give NORMAL, and versions to leave out such "
            "as -VERS-TLS1.3"
        )
    return [_USABLE[version] for version in sorted(allowed)]


class TlsSession:
    """One session; one thread may encrypt while another decrypts.

    OpenSSL's object bears one call at a time, so both take turns, and neither waits for the network in its
    turn.

    :param hostname: the name that a server's certificate must have; None: this side is the server.
    """

    def __init__(self, context: ssl.SSLContext, hostname: str | None) -> None:
        self._lock = threading.Lock()
        # Under the lock.
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=hostname is None, server_hostname=hostname
        )
        self.ended = False
        """The peer has ended the stream."""

    def handshake(self) -> tuple[bytes, bool]:
        """Go on with the handshake; return what to send, also with an error, and whether it is done.

        :raises ssl.SSLError: it has failed; see :meth:`unsent`.
        """
        with self._lock:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                return self._outgoing.read(), False
            return self._outgoing.read(), True

    def unsent(self) -> bytes:
        """What is to be sent: an alert that says why the handshake has failed."""
        with self._lock:
            return self._outgoing.read()

    def peer_certificate(self) -> bytes | None:
        """The certificate of the peer, in DER; None: it has shown none."""
        with self._lock:
            return self._object.getpeercert(binary_form=True)

    def encrypt(self, data: "bytes | memoryview") -> bytes:
        """Return what carries these bytes, and what the session has to say besides.

        :raises TlsFailure: the session has failed.
        """
        with self._lock:
            try:
                self._object.write(data)
            except ssl.SSLError as error:
                raise failure(error) from error
            return self._outgoing.read()

    def feed(self, data: memoryview) -> None:
        """Take what has come; nothing: the connection has ended."""
        with self._lock:
            if len(data):
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    def decrypt_into(self, view: memoryview) -> int:
        """Decrypt as much as there is and fits; return how many bytes, 0 as well at the end.

        :raises TlsCut: the connection has ended, and the stream has not.
        :raises TlsFailure: the peer has refused this side, or has sent what is no TLS.
        """
        count = 0
        with self._lock:
            try:
                while count < len(view) and not self.ended:
                    n_bytes = self._read_into(view[count:])
                    self.ended = not n_bytes
                    count += n_bytes
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                if not count:  # what came before the end counts first
                    raise failure(error) from error
            if self._outgoing.pending > _MOST_UNSENT_BYTES:
                raise TlsFailure("the peer asks for new keys without end")
        return count

    def _read_into(self, view: memoryview) -> int:
        # With a buffer it returns how many bytes, which typeshed does not say.
        return cast("int", self._object.read(len(view), cast("bytearray", view)))

    @property
    def has_more(self) -> bool:
        """Whether bytes have been fed that are not decrypted."""
        with self._lock:
            return bool(self._object.pending() or self._incoming.pending)

    def close_notify(self) -> bytes:
        """Return what ends this side's stream."""
        with self._lock:
            try:
                self._object.unwrap()
            except ssl.SSLError:
                pass  # it waits for the peer's, which is not needed
            return self._outgoing.read()


def failure(error: ssl.SSLError) -> OSError:
    """The error to show for one of OpenSSL's."""
    if isinstance(error, ssl.SSLEOFError):
        return TlsCut()
    if isinstance(error, ssl.SSLCertVerificationError):
        return TlsFailure(f"the peer's certificate is refused: {error.verify_message}")
    reason = error.reason or str(error)
    text = reason.lower().replace("_", " ")
    if "ALERT" in reason:
        return TlsFailure(f"the peer refuses this side's TLS: {text.rpartition('alert ')[2]}")
    return TlsFailure(f"TLS failed: {text}")
