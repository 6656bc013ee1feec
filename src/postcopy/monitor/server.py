"""Listens for monitor clients and gives each a session and a thread."""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from postcopy.channel.address import (
    SocketPath,
    UnixAddress,
    parse_socket,
    remove_stale,
    tcp_uri,
)
from postcopy.errors import CannotListen, HostCannot
from postcopy.kernel import threads
from postcopy.monitor.controls import Backend
from postcopy.monitor.hmp_console import HmpSession
from postcopy.monitor.qmp_session import QmpSession

_log = logging.getLogger(__name__)


class Session(Protocol):
    """What serves one client."""

    def run(self) -> None:
        """Serve until the client goes."""

    def close(self) -> None:
        """End from another thread, after what was answered has been sent."""


class MonitorServer:
    """Serves any number of clients at one address.

    A client that can connect may do everything, as with QEMU's monitors: use a Unix socket in a private
    directory, or a loopback address.

    :param address: as :func:`~postcopy.channel.address.parse_socket` reads it (port 0: the kernel chooses).
    :param whose: what the address is called in errors.
    :param most: sessions at a time; a client that comes then is disconnected.
    :raises Refused: not such an address.
    :raises CannotListen: another process listens there, or the address is not of this host.
    """

    def __init__(
        self,
        address: str,
        backend: Backend,
        session: Callable[[socket.socket, Backend], Session],
        *,
        whose: str = "monitor",
        most: int | None = None,
    ) -> None:
        self._backend = backend
        self._make_session = session
        self._most = most
        self._listener, self._path = _listen(address, whose)
        self._taken = None if self._path is None else SocketPath(self._path)
        # Guards the next two; a session is in the set from its accept to its end.
        self._lock = threading.Lock()
        self._sessions: set[Session] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="monitor", daemon=True)
        threads.start(self._thread)

    @property
    def address(self) -> str:
        """Where clients find it, with the port that the kernel chose."""
        if self._path is not None:
            return f"unix:{self._path}"
        return tcp_uri(*self._listener.getsockname()[:2])

    def close(self) -> None:
        """Send what is still unsent, end all sessions, and take the address away."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            sessions = list(self._sessions)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        if self._taken is not None:
            self._taken.remove()
        for session in sessions:
            session.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                _log.warning("cannot accept a monitor client", exc_info=True)
                threading.Event().wait(0.1)  # out of descriptors, most likely: let some go
                continue
            session = self._make_session(connection, self._backend)
            with self._lock:
                full = self._most is not None and len(self._sessions) >= self._most
                if not full:
                    self._sessions.add(session)
                closed = self._closed
            if closed or full:
                connection.close()
            if closed:
                return
            if not full:
                self._begin(session, connection)

    def _begin(self, session: Session, connection: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(session,), name="monitor-client")
        thread.daemon = True
        try:
            threads.start(thread)
        except HostCannot as error:
            _log.warning("a monitor client is refused: %s", error)
            with self._lock:
                self._sessions.discard(session)
            connection.close()

    def _serve(self, session: Session) -> None:
        try:
            session.run()
        except Exception:
            _log.exception("a monitor client's session ended with an error")
        finally:
            with self._lock:
                self._sessions.discard(session)


def serve_qmp(address: str, backend: Backend) -> MonitorServer:
    """Serve QMP at ``address``; see :class:`MonitorServer`."""
    return MonitorServer(address, backend, QmpSession)


def serve_hmp(address: str, backend: Backend) -> MonitorServer:
    """Serve HMP at ``address``; see :class:`MonitorServer`."""
    return MonitorServer(address, backend, HmpSession)


def _listen(address: str, whose: str) -> tuple[socket.socket, Path | None]:
    where = parse_socket(address, whose)
    try:
        if isinstance(where, UnixAddress):
            return _listen_unix(Path(where.path)), Path(where.path)
        return _listen_tcp(where.host, where.port), None
    except (OSError, UnicodeError) as error:  # names of hosts have an encoding of their own
        why = getattr(error, "strerror", None) or error
        raise CannotListen(f"cannot listen at {address}: {why}") from error


def _listen_unix(path: Path) -> socket.socket:
    remove_stale(path)  # left behind by a process that was killed
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _listen_tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)
