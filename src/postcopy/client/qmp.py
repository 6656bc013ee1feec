"""A QMP connection: ``qemu.qmp`` with this package's errors."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterable, Mapping
from typing import Any, Final

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    QMPClient,
    QMPError,
    StateError,
)

from postcopy.channel.address import parse_socket
from postcopy.errors import CannotConnect, ChannelBroken, Reason, Refused

_HANG_UP_S: Final = 1.0
_UCRED: Final = "3i"  # struct ucred, see unix(7)
_MOST_BYTES: Final = 1 << 20
_CONTEXT: Final = 40
_MOST_DIGITS: Final = 300  # a machine makes a float of a number that is too large, and 308 fit

# The library logs each lost connection with a traceback, and raises it as well.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class _Client(QMPClient):
    """The library's client, which tells its peer besides."""

    def peer(self) -> int | None:
        """The process at the other end of a Unix socket, as it was when that began to listen."""
        connected = None if self._writer is None else self._writer.get_extra_info("socket")
        if connected is None or connected.family != socket.AF_UNIX:
            return None
        size = struct.calcsize(_UCRED)
        raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        process_id: int = struct.unpack(_UCRED, raw)[0]
        return process_id or None


class QmpConnection:
    """A negotiated QMP connection; made by :meth:`connect`.

    :ivar address: as the user gave it.
    """

    def __init__(self, address: str, client: _Client) -> None:
        self.address = address
        self._client = client
        self._version: Mapping[str, Any] = {}

    @classmethod
    async def connect(cls, address: str, *, timeout_s: float = 10.0) -> "QmpConnection":
        """Connect once and negotiate.

        :raises Refused: not an address.
        :raises CannotConnect: no server listens there, or it does not speak QMP.
        """
        return await cls._negotiate(address, parse_socket(address, "QMP").endpoint, timeout_s)

    @classmethod
    async def over(
        cls, connected: socket.socket, name: str, *, timeout_s: float = 10.0
    ) -> "QmpConnection":
        """As :meth:`connect`, over a socket that is connected already and becomes ours.

        :param name: of the machine, for messages.
        """
        return await cls._negotiate(name, connected, timeout_s)

    @classmethod
    async def _negotiate(
        cls, address: str, where: "str | tuple[str, int] | socket.socket", timeout_s: float
    ) -> "QmpConnection":
        client = _Client(address)
        try:
            async with asyncio.timeout(timeout_s):
                await client.connect(where)
        except TimeoutError as error:
            await _hang_up(client)
            why = (
                f"no QMP greeting within {timeout_s:g} s; a monitor may serve one client at a time"
            )
            raise CannotConnect(f"cannot use QMP at {address}: {why}") from error
        except ConnectError as error:
            await _hang_up(client)
            raise CannotConnect(_why_not(address, error)) from error
        return cls(address, client)

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, oob: bool = False
    ) -> Any:
        """Execute one command and return its result.

        :param oob: out of band: past other commands, even if the machine's main loop is blocked.
        :raises Refused: the machine refuses it, with the machine's text; or the arguments cannot be
            encoded in JSON, and nothing has been sent.
        :raises ChannelBroken: the connection ended before the answer came.
        """
        _check_json(command, arguments)
        try:
            return await self._client.execute(command, arguments, oob=oob)
        except ExecuteError as error:
            raise Refused(str(error), _reason(error)) from error
        except (ExecInterruptedError, StateError) as error:
            text = f"the QMP connection to {self.address} ended; is the machine still running?"
            raise ChannelBroken(text) from error

    async def is_ours(self) -> bool:
        """Whether the machine is postcopy's, whose commands carry their own options."""
        return "postcopy" in (await self.version()).get("package", "")

    async def version(self) -> Mapping[str, Any]:
        """Return the result of ``query-version``, which is executed once."""
        self._version = self._version or await self.execute("query-version")
        return self._version

    @property
    def process_id(self) -> int | None:
        """The machine's process, if it is on this host and made the socket itself; None: not known."""
        return self._client.peer()

    async def give(self, name: str, fd: int) -> None:
        """Pass a descriptor to the machine under a name (QMP's ``getfd``); the caller closes its own.

        :raises Refused: the machine takes no descriptor, or the connection is not a Unix socket.
        :raises ChannelBroken: the machine is gone.
        """
        try:
            self._client.send_fd_scm(fd)
        except (OSError, StateError) as error:
            raise ChannelBroken(f"the QMP connection to {self.address} ended: {error}") from error
        except QMPError as error:
            raise Refused(
                f"{self.address} cannot carry a descriptor; use the machine's Unix socket for QMP"
            ) from error
        await self.execute("getfd", {"fdname": name})

    def listen(self) -> contextlib.AbstractContextManager[AsyncIterable[Mapping[str, Any]]]:
        """Return a context whose value iterates over all events."""
        return self._client.listener()

    async def close(self) -> None:
        """Disconnect; harmless when the other side has done so before."""
        await _hang_up(self._client)


def _reason(error: ExecuteError) -> Reason:
    if error.error_class == "CommandNotFound":
        return Reason.COMMAND
    said = error.received["error"]
    assert isinstance(said, Mapping)  # the client library has checked it
    known = {reason.value: reason for reason in Reason}  # a newer machine may have more
    return known.get(said.get("x-reason", ""), Reason.UNKNOWN)


async def _hang_up(client: _Client) -> None:
    gone = (QMPError, OSError, EOFError, asyncio.IncompleteReadError, TimeoutError)
    with contextlib.suppress(*gone):
        async with asyncio.timeout(_HANG_UP_S):  # unsent bytes wait until the machine reads them
            await client.disconnect()


def _check_json(command: str, arguments: Mapping[str, Any] | None) -> None:
    """Refuse what is no JSON: a machine answers it without an id, and the connection is lost."""
    try:
        text = json.dumps([command, arguments], ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
        json.loads(text, parse_int=_check_integer)
    except UnicodeEncodeError as error:
        around = error.object[max(0, error.start - _CONTEXT) : error.end + _CONTEXT]
        raise Refused(
            f"the arguments of {command} are not UTF-8, and QMP carries nothing else: {around!r}; give "
            "another name"
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"the arguments of {command} cannot be encoded in JSON: {error}") from error
    if size > _MOST_BYTES:
        raise Refused(f"the arguments of {command} are {size} bytes; a machine takes {_MOST_BYTES}")


def _check_integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _why_not(address: str, error: ConnectError) -> str:
    cause: BaseException = error.exc
    while isinstance(getattr(cause, "exc", None), BaseException):
        cause = cause.exc  # type: ignore[attr-defined]
    if isinstance(cause, OSError) and cause.errno:
        reason = os.strerror(cause.errno)  # asyncio writes its own text into strerror
    elif isinstance(cause, EOFError):
        reason = "the machine closed the connection"
    else:
        reason = str(cause) or type(cause).__name__
    return (
        f"cannot reach QMP at {address}: {reason}; start the machine there with '--qmp {address}'"
    )
