"""One QMP client from its greeting to its end.

Three threads a client: the *reader* takes requests apart and runs those out of band at once (one that
may take a moment gets a thread of its own); the *worker* runs the others one after another, so one that
waits for a missing page holds up neither ``migrate-recover`` nor other clients; the *writer* sends answers
and events in the order in which they were made.  What the reader finds wrong with a request is the
worker's to answer, in its turn.
"""

import json
import logging
import queue
import socket
import threading
from typing import Any

from postcopy.errors import HostCannot, PostcopyError
from postcopy.events import Event
from postcopy.kernel import threads
from postcopy.monitor import qmp_messages
from postcopy.monitor.backend import Backend
from postcopy.monitor.json_stream import JsonError, JsonStream
from postcopy.monitor.qmp_commands import COMMANDS
from postcopy.monitor.qmp_messages import QmpError, Request

_log = logging.getLogger(__name__)

_MAX_WAITING_REQUESTS = 64
_MAX_UNSENT_MESSAGES = 4096
_FLUSH_SECONDS = 1.0

_NEGOTIATE = "qmp_capabilities"


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
        self._unsent.put(qmp_messages.greeting())
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
        # Nobody sends any more; the worker may still wait for a page, and ends after that.
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
            # It was stuck in a client that does not read; now it throws away what is left.
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
            request = qmp_messages.parse(message, out_of_band_allowed=self._out_of_band)
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
            return qmp_messages.answered(message, self._execute(request))
        except QmpError as error:
            return qmp_messages.failed(message, error)

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
        # Goes on without a client, so that nobody waits for room in a queue that nobody empties.
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
