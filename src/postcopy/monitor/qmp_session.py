"""One QMP client from its greeting to its end.

Three threads a client: the *reader* takes requests apart and runs those out of band at once (one that
may take a moment gets a thread of its own); the *worker* runs the others one after another, so one that
waits for a missing page holds up neither ``migrate-recover`` nor other clients; the *writer* sends answers
and events in the order in which they were made.  What the reader finds wrong with a request is the
worker's to answer, in its turn.

Here are also QMP's messages, and the commands that are about QMP itself; the others are in one table with
those of HMP.
"""

import json
import logging
import queue
import socket
import threading
from dataclasses import dataclass
from typing import Any

from postcopy.errors import HostCannot, PostcopyError, Reason, Refused
from postcopy.events import Event
from postcopy.kernel import threads
from postcopy.monitor import version
from postcopy.monitor.argument_types import Arguments, Struct, array, enumeration, integer, string
from postcopy.monitor.command import Command
from postcopy.monitor.commands import TABLE
from postcopy.monitor.controls import Backend
from postcopy.monitor.hmp import Hmp
from postcopy.monitor.json_stream import JsonError, JsonStream

_log = logging.getLogger(__name__)

_MAX_WAITING_REQUESTS = 64
_MAX_UNSENT_MESSAGES = 4096
_FLUSH_SECONDS = 1.0

_NEGOTIATE = "qmp_capabilities"
_NO_ID = object()


class QmpError(Exception):
    """What the client gets instead of an answer."""

    def __init__(
        self, description: str, error_class: str = "GenericError", reason: Reason | None = None
    ) -> None:
        super().__init__(description)
        self.error_class = error_class
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Request:
    """A client's request; ``id`` comes back with the answer."""

    command: str
    arguments: dict[str, Any]
    out_of_band: bool


def greeting() -> dict[str, Any]:
    """The first message to a client."""
    return {"QMP": {"version": version.query_version(), "capabilities": ["oob"]}}


def parse(message: object, *, out_of_band_allowed: bool) -> Request:
    """What a client's ``message`` asks for.

    :raises QmpError: in QEMU's words.
    """
    if not isinstance(message, dict):
        raise QmpError("QMP input must be a JSON object")
    execute = ("execute", "exec-oob") if out_of_band_allowed else ("execute",)
    asked: list[str] = []
    for name, value in message.items():
        if name in execute:
            if not isinstance(value, str):
                raise QmpError(f"QMP input member '{name}' must be a string")
            asked.append(name)
        elif name == "arguments":
            if not isinstance(value, dict):
                raise QmpError("QMP input member 'arguments' must be an object")
        elif name != "id":
            raise QmpError(f"QMP input member '{name}' is unexpected")
    if not asked:
        raise QmpError("QMP input lacks member 'execute'")
    if len(asked) > 1:
        raise QmpError(f"QMP input member '{asked[1]}' clashes with '{asked[0]}'")
    arguments = message.get("arguments", {})
    return Request(message[asked[0]], arguments, out_of_band=asked[0] == "exec-oob")


def answered(message: object, result: object) -> dict[str, Any]:
    """The answer to ``message``; a command that returns nothing returns ``{}``."""
    return {"return": {} if result is None else result} | _id_of(message)


def failed(message: object, error: QmpError) -> dict[str, Any]:
    """The complaint about ``message``."""
    said = {"class": error.error_class, "desc": str(error)}
    if error.reason is not None:
        said["x-reason"] = error.reason.value
    return {"error": said} | _id_of(message)


def _id_of(message: object) -> dict[str, Any]:
    identity = message.get("id", _NO_ID) if isinstance(message, dict) else _NO_ID
    return {} if identity is _NO_ID else {"id": identity}


def _human_monitor_command(backend: Backend, arguments: Arguments) -> str:
    if arguments.get("cpu-index", 0) not in range(max(1, len(backend.machine.vcpus))):
        raise Refused("Parameter 'cpu-index' expects a CPU number")
    return Hmp(backend, interactive=False).run(arguments["command-line"]).replace("\n", "\r\n")


_OWN = (
    # The session itself does it, but clients expect to see it listed.
    Command(
        _NEGOTIATE,
        "begin the session; with `oob`, commands may be executed out of band",
        arguments=Struct(optional={"enable": array(enumeration("oob"))}),
    ),
    Command(
        "human-monitor-command",
        "what HMP prints for a line",
        _human_monitor_command,
        Struct({"command-line": string}, {"cpu-index": integer}),
    ),
    Command(
        "query-commands", "the QMP commands", lambda _b, _a: [{"name": name} for name in COMMANDS]
    ),
)

COMMANDS: dict[str, Command] = {
    command.name: command for command in (*_OWN, *TABLE) if command.name
}
"""Every QMP command by its name."""


class QmpSession:
    """Serves one client on a connected socket, which it owns from here on."""

    def __init__(self, connection: socket.socket, backend: Backend) -> None:
        self._connection = connection
        self._backend = backend
        self._negotiated = False  # written by the reader alone, as is the next
        self._out_of_band = False
        self._wants_events = False  # written by the worker alone
        self._answered = threading.Event()  # the negotiation, or the worker has ended
        self._requests: queue.Queue[tuple[object, Request | QmpError] | None] = queue.Queue(
            _MAX_WAITING_REQUESTS
        )
        self._unsent: queue.Queue[dict[str, Any] | None] = queue.Queue(_MAX_UNSENT_MESSAGES)
        self._worker = threading.Thread(target=self._work, name="qmp-worker", daemon=True)
        self._writer = threading.Thread(target=self._write, name="qmp-writer", daemon=True)

    def run(self) -> None:
        """Serve until the client goes or :meth:`close` is called; the caller is the reader."""
        self._unsent.put(greeting())
        unsubscribe = self._backend.events.subscribe(self._on_event)
        try:
            threads.start(self._writer)
            threads.start(self._worker)
            self._read()
        finally:
            unsubscribe()
            self._finish()

    def _finish(self) -> None:
        # A script may send all its requests, close its side, and only then read the answers.
        self.close()
        self._connection.close()
        # No request comes any more; the worker may still wait for a page, and ends after that.
        self._requests.put(None)

    def close(self) -> None:
        """Answer what was asked, for a second at most, send it, and end.

        Any thread may call it, but not the one that answers.
        """
        # The answer to a `quit` that ends us is still being made.
        if self._try_end(self._requests) and self._worker.is_alive():
            self._worker.join(_FLUSH_SECONDS)
        self._try_end(self._unsent)
        if self._writer.is_alive():
            self._writer.join(_FLUSH_SECONDS)
        self._hang_up()
        if self._writer.is_alive():
            # The writer waited for a client that does not read; from now on it drops what is left.
            self._unsent.put(None)

    def _hang_up(self) -> None:
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            _log.debug("the client was gone already")

    @staticmethod
    def _try_end(messages: "queue.Queue[Any]") -> bool:
        try:
            messages.put_nowait(None)
        except queue.Full:
            return False
        return True

    # Section: the reader

    def _read(self) -> None:
        stream = JsonStream()
        while data := self._receive():
            for message in stream.feed(data):
                self._take(message)

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(65536)
        except OSError:
            return b""

    def _take(self, message: object) -> None:
        if isinstance(message, JsonError):
            self._requests.put((None, QmpError(str(message))))
            return
        try:
            request = parse(message, out_of_band_allowed=self._out_of_band)
        except QmpError as error:
            self._requests.put((message, error))
            return
        allowed = self._allowed(request)
        if request.out_of_band:
            self._answer_out_of_band(message, request, allowed)
        else:
            # Blocks when the client asks faster than we answer: then it has to wait.
            self._requests.put((message, allowed))
            if allowed is request and request.command == _NEGOTIATE:
                self._answered.wait()  # what may be out of band from now on does not overtake it

    def _answer_out_of_band(
        self, message: object, request: Request, allowed: Request | QmpError
    ) -> None:
        def answer() -> None:
            self._unsent.put(self._answer(message, allowed))

        command = COMMANDS.get(request.command)
        if command is not None and command.in_background:
            thread = threading.Thread(target=answer, name="qmp-out-of-band", daemon=True)
            try:
                threads.start(thread)
            except HostCannot as error:
                self._unsent.put(self._answer(message, QmpError(str(error))))
        else:
            answer()

    def _allowed(self, request: Request) -> Request | QmpError:
        try:
            self._check(request)
        except QmpError as error:
            return error
        return request

    def _check(self, request: Request) -> None:
        name = request.command
        if self._negotiated and name == _NEGOTIATE:
            raise QmpError(
                "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
            )
        if not self._negotiated and name != _NEGOTIATE:
            raise QmpError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        if name in COMMANDS and request.out_of_band and not COMMANDS[name].out_of_band:
            raise QmpError(f"The command {name} does not support OOB")
        if self._negotiated:
            return
        try:
            enable = COMMANDS[_NEGOTIATE].arguments(request.arguments, "").get("enable", [])
        except PostcopyError as error:
            raise QmpError(str(error)) from error
        self._negotiated, self._out_of_band = True, "oob" in enable

    # Section: the worker, and the reader for what is out of band

    def _work(self) -> None:
        while (item := self._requests.get()) is not None:
            message, request = item
            self._unsent.put(self._answer(message, request))
            if isinstance(request, Request) and request.command == _NEGOTIATE:
                self._wants_events = True  # a client expects none before this answer
                self._answered.set()
        self._answered.set()

    def _answer(self, message: object, request: Request | QmpError) -> dict[str, Any]:
        try:
            if isinstance(request, QmpError):
                raise request
            return answered(message, self._execute(request))
        except QmpError as error:
            return failed(message, error)

    def _execute(self, request: Request) -> object:
        if request.command == _NEGOTIATE:
            return None  # done by the reader, which must know at once what it may take
        command = COMMANDS.get(request.command)
        if command is None:
            raise QmpError(f"The command {request.command} has not been found", "CommandNotFound")
        try:
            return command.run(self._backend, command.arguments(request.arguments, ""))
        except PostcopyError as error:
            raise QmpError(str(error), reason=error.reason) from error
        except Exception as error:
            _log.exception("internal error in %s", command.name)
            text = f"internal error in {command.name}: {type(error).__name__}; see the log"
            raise QmpError(text) from error

    # Section: the writer

    def _on_event(self, event: Event) -> None:
        if not self._wants_events:
            return
        try:
            self._unsent.put_nowait(event.to_qmp())
        except queue.Full:
            _log.warning("a QMP client does not read its events and is cut off")
            self._hang_up()

    def _write(self) -> None:
        client_is_there = True
        # Goes on without a client: else the other threads would wait for room in the queue.
        while (message := self._unsent.get()) is not None:
            if client_is_there:
                client_is_there = self._send(message)

    def _send(self, message: dict[str, Any]) -> bool:
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\r\n")
        except OSError:
            self._hang_up()
            return False
        return True
