"""Where a migration goes to or comes from: QEMU's URIs.

The forms and the error texts are QEMU 10's (``qapi/migration.json``, ``docs/devel/migration``)::

    tcp:HOST:PORT    tcp:[::1]:4444, tcp:0:4444 (any IPv4 address), tcp::4444 (any address)
    unix:PATH
    fd:NUMBER        or a name given to the monitor by getfd, which the monitor resolves
    file:PATH[,offset=N]
    exec:COMMAND     run by /bin/sh -c
"""

import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from postcopy.errors import Refused
from postcopy.sizes import OutOfRange, parse_size
from postcopy.tls_options import TlsOptions

SUN_PATH_BYTES = 108
"""Room for a Unix socket's path and its closing zero, see unix(7)."""

_INET = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.%\w]+)\]|(?P<host>[^:,\[\]]*)):(?P<port>[0-9]+)")


@dataclass(frozen=True)
class TcpAddress:
    """A TCP host (a name, an address, or ``""`` for any) and port (0: the kernel chooses)."""

    host: str
    port: int

    def __str__(self) -> str:
        return tcp_uri(self.host, self.port)

    @property
    def endpoint(self) -> tuple[str, int]:
        """What a client connects to."""
        return self.host or "127.0.0.1", self.port

    def to_qapi(self) -> dict[str, object]:
        """QAPI's ``SocketAddress``; its port is text."""
        return {"type": "inet", "host": self.host, "port": str(self.port)}


@dataclass(frozen=True)
class UnixAddress:
    """A Unix stream socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def endpoint(self) -> str:
        """What a client connects to."""
        return self.path

    def to_qapi(self) -> dict[str, object]:
        """QAPI's ``SocketAddress``."""
        return {"type": "unix", "path": self.path}


@dataclass(frozen=True)
class FdAddress:
    """An open descriptor: its number in this process, or a name which the monitor resolves."""

    fd: int | str

    def __str__(self) -> str:
        return f"fd:{self.fd}"

    def to_qapi(self) -> dict[str, object]:
        """QAPI's ``SocketAddress``."""
        return {"type": "fd", "str": str(self.fd)}

    @property
    def number(self) -> int:
        """The descriptor's number.

        :raises Refused: it is a name that has not been resolved.
        """
        if isinstance(self.fd, str):
            raise Refused(f"File descriptor named '{self.fd}' has not been found")
        return self.fd


@dataclass(frozen=True)
class FileAddress:
    """A file, and the byte in it where the stream starts."""

    path: str
    offset: int = 0

    def __str__(self) -> str:
        return f"file:{self.path},offset={self.offset:#x}" if self.offset else f"file:{self.path}"

    def to_qapi(self) -> None:
        """A file has no ``SocketAddress``: query-migrate leaves it out."""


@dataclass(frozen=True)
class ExecAddress:
    """A shell command that takes the stream on its input, or gives it on its output."""

    command: str

    def __str__(self) -> str:
        return f"exec:{self.command}"

    def to_qapi(self) -> None:
        """A command has no ``SocketAddress``: query-migrate leaves it out."""


Address = TcpAddress | UnixAddress | FdAddress | FileAddress | ExecAddress


def parse(uri: str) -> Address:
    """Read a migration URI.

    :raises Refused: no such protocol, or its address makes no sense; the text is QEMU's.
    """
    protocol, colon, rest = uri.partition(":")
    if not colon or protocol not in _PARSERS:
        raise Refused(f"unknown migration protocol: {uri}")
    if "\0" in rest:
        raise Refused(f"a zero byte in the address: {uri!r}")
    if not rest.isascii() and rest != rest.encode(errors="replace").decode():
        raise Refused(f"an address that is not UTF-8: {uri!r}")
    return _PARSERS[protocol](rest)


def parse_socket(text: str, whose: str) -> "TcpAddress | UnixAddress":
    """Read the address of a monitor: ``unix:PATH``, ``tcp:HOST:PORT``, or a path with a slash in it.

    What QEMU takes after a comma (``server=on,wait=off``) changes nothing.

    :param whose: such as ``QMP``, for the complaint.
    :raises Refused: not such an address.
    """
    why, text = "", text.partition(",")[0]
    if "/" in text.partition(":")[0]:
        text = f"unix:{text}"
    try:
        found = parse(text)
        if isinstance(found, TcpAddress | UnixAddress):
            return found
    except Refused as error:
        if text.startswith("unix:") and text != "unix:":
            why = f" ({error})"
    raise Refused(f"'{text}' is no {whose} address{why}; give unix:PATH or tcp:HOST:PORT")


def tcp_uri(host: str, port: object) -> str:
    """``tcp:HOST:PORT``, with brackets around an address of IPv6."""
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def _parse_tcp(rest: str) -> TcpAddress:
    match = _INET.fullmatch(rest)
    # int() of a thousand digits is slow, and of five is enough.
    if match is None or len(match["port"]) > 5 or int(match["port"]) > 0xFFFF:
        raise Refused(f"error parsing address '{rest}'")
    return TcpAddress(match["v6"] or match["host"] or "", int(match["port"]))


def _parse_unix(rest: str) -> UnixAddress:
    if not rest:
        raise Refused("invalid Unix socket address")
    if len(rest.encode()) >= SUN_PATH_BYTES:
        raise Refused(f"UNIX socket path '{rest}' is too long: it must be < {SUN_PATH_BYTES} bytes")
    return UnixAddress(rest)


def _parse_fd(rest: str) -> FdAddress:
    if not rest:
        raise Refused("Invalid file descriptor number ''")
    is_number = rest.isascii() and rest.isdigit() and len(rest) < 10
    return FdAddress(int(rest) if is_number else rest)


def _parse_file(rest: str) -> FileAddress:
    path, comma, offset_text = rest.partition(",offset=")
    try:
        offset = parse_size(offset_text, most=(1 << 63) - 1) if comma else 0  # no file is larger
    except OutOfRange:
        why = "Numerical result out of range"
        raise Refused(f"file URI has bad offset {offset_text}: {why}") from None
    except ValueError:
        raise Refused(f"file URI has bad offset {offset_text}: Invalid argument") from None
    if not path:
        raise Refused("file URI has no path; give file:PATH[,offset=N]")
    return FileAddress(path, offset)


def _parse_exec(rest: str) -> ExecAddress:
    if not rest:
        raise Refused("exec URI has no command; give exec:COMMAND")
    return ExecAddress(rest)


_PARSERS: dict[str, Callable[[str], Address]] = {
    "tcp": _parse_tcp,
    "unix": _parse_unix,
    "fd": _parse_fd,
    "file": _parse_file,
    "exec": _parse_exec,
}


def bound_uri(uri: str, addresses: Sequence[Mapping[str, object]]) -> str:
    """Where a listener can be reached in fact: a port of 0 has become a real one.

    :param addresses: of the listener, as QAPI has them.
    """
    if addresses and addresses[0].get("type") == "inet":
        return f"tcp:{addresses[0]['host']}:{addresses[0]['port']}"
    return uri


def check_tls_address(tls: TlsOptions, address: Address) -> None:
    """Refuse an address over which nothing would be encrypted, or to which no certificate can belong.

    :raises Refused: it is such an address.
    """
    if not isinstance(address, TcpAddress | UnixAddress | FdAddress):
        raise Refused(
            f"tls-creds is set, and {address} cannot be encrypted; use tcp:, unix: or fd:, or clear "
            "tls-creds"
        )
    is_named = isinstance(address, TcpAddress) or tls.hostname or not tls.verify_peer
    if not tls.is_server and not is_named:
        raise Refused(
            f"{address} has no host name to check the destination's certificate against; set "
            "tls-hostname"
        )


class SocketPath:
    """The path of a listening Unix socket, removed only while it is still the socket that was bound there.

    :raises OSError: there is no such path.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._bound = self._path.lstat()

    def remove(self) -> None:
        """Remove it, unless another process has bound the path meanwhile, or it is gone."""
        with contextlib.suppress(OSError):
            if os.path.samestat(self._path.lstat(), self._bound):
                self._path.unlink()


def remove_stale(path: Path) -> None:
    """Remove a stream socket whose listener has ended; anything else at the path stays.

    :raises OSError: it cannot be removed.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if stat.S_ISSOCK(mode) and _is_refused(path):
        path.unlink()


def _is_refused(path: Path) -> bool:
    """Whether no process listens; a full queue, missing rights, another kind of socket do not say so."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED
