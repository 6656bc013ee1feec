"""Calls and notes between two processes, with file descriptors, over a Unix stream socket.

A message is a u32 length and that many bytes of JSON.  Descriptors travel by ``SCM_RIGHTS`` with the
message that names them, and arrive in the same order.  Both ends may call at any time; a call is
answered from a thread of its own, so that one which waits (for a missing page, say) holds up no
other.  Notes have no answer and keep their order.
"""

import array
import itertools
import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from postcopy import errors
from postcopy.errors import EngineDied, PostcopyError

_LENGTH = struct.Struct("<I")
_LONGEST_BYTES = 64 << 20
_MOST_DESCRIPTORS = 128

Handler = Callable[..., Any]


class Answer:
    """What a call waits for; from any thread."""

    def __init__(self) -> None:
        self._come = threading.Event()
        self._result: Any = None
        self._error: PostcopyError | None = None

    def give(self, result: Any, error: PostcopyError | None = None) -> None:
        """End the wait, unless it has ended."""
        if not self._come.is_set():
            self._result, self._error = result, error
            self._come.set()

    @property
    def has_come(self) -> bool:
        """Whether :meth:`wait` returns at once."""
        return self._come.is_set()

    def settle(self) -> None:
        """Wait until it has come, or never will."""
        self._come.wait()

    def wait(self, timeout_s: float | None = None) -> Any:
        """The other end's answer.

        :raises EngineDied: the other process is gone.
        :raises PostcopyError: whatever the other end raised, by its own class where it has one here.
        """
        if not self._come.wait(timeout_s):
            raise TimeoutError(f"no answer within {timeout_s} s")
        if self._error is not None:
            raise self._error
        return self._result


class Descriptors(list[int]):
    """What a handler returns, or a call passes, to send descriptors along."""


class Link:
    """One end of the link.

    :param handlers: what the other end may call, and the notes that it may send, by name; each
        is called with the message's arguments, and with ``fds`` if descriptors came along.
    :param on_end: called once, from the reader's thread, when the other end is gone.
    :param completed: the handlers that are let finish before that, if they are at work then: what
        they do must not come after what its end does.
    """

    def __init__(
        self,
        connection: socket.socket,
        handlers: Mapping[str, Handler],
        *,
        on_end: Callable[[], None] = lambda: None,
        completed: frozenset[str] = frozenset(),
        name: str = "link",
    ) -> None:
        self._socket = connection
        self._handlers = dict(handlers)
        self._on_end = on_end
        self._completed = completed
        # The reader's alone: the threads of those, as long as they may be at work.
        self._at_work: list[threading.Thread] = []
        self._over = threading.Event()
        self._numbers = itertools.count(1)
        self._sending = threading.Lock()
        # Calls that wait for their answer; `_ended` and this dictionary change under `_waiting_lock`.
        self._waiting: dict[int, Answer] = {}
        self._waiting_lock = threading.Lock()
        self._ended = False
        self._incoming: list[int] = []
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)

    def serve(
        self, handlers: Mapping[str, Handler], *, completed: frozenset[str] = frozenset()
    ) -> None:
        """Let the other end call and send these, too."""
        self._completed |= completed
        self._handlers.update(handlers)

    def start(self) -> None:
        """Begin to take messages."""
        self._reader.start()

    def call(
        self,
        name: str,
        *,
        fds: Sequence[int] = (),
        timeout_s: float | None = None,
        **arguments: Any,
    ) -> Any:
        """Ask the other end and wait for its answer.

        :raises EngineDied: the other process is gone.
        :raises PostcopyError: whatever the other end raised, by its own class where it has one here.
        """
        number, answer = self._ask(name, arguments, fds)
        try:
            return answer.wait(timeout_s)
        finally:
            self._waiting.pop(number, None)

    def ask(self, name: str, **arguments: Any) -> Answer:
        """Call the other end, and do something else until it answers.

        :raises EngineDied: the other process is gone.
        """
        return self._ask(name, arguments, ())[1]

    def _ask(
        self, name: str, arguments: Mapping[str, Any], fds: Sequence[int]
    ) -> tuple[int, Answer]:
        number, answer = next(self._numbers), Answer()
        with self._waiting_lock:
            if self._ended:
                raise EngineDied(f"{name}: the other process is gone")
            self._waiting[number] = answer
        self._send({"call": name, "id": number, "args": arguments, "fds": len(fds)}, fds)
        return number, answer

    def note(self, name: str, **arguments: Any) -> None:
        """Tell the other end; nobody answers.  Silently nothing when the other end is gone."""
        self._send({"note": name, "args": arguments}, ())

    def close(self) -> None:
        """End the link; calls that wait fail with :class:`EngineDied`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was quicker

    def wait_over(self) -> None:
        """Wait until the other end is gone and ``on_end`` has returned; not from a handler."""
        self._over.wait()

    # --- sending

    def _send(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        body = json.dumps(message).encode()
        data = _LENGTH.pack(len(body)) + body
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            with self._sending:
                sent = self._socket.sendmsg([data], ancillary)
                if sent < len(data):
                    self._socket.sendall(data[sent:])
        except OSError:
            pass  # the reader sees the end as well, and fails every waiting call

    # --- receiving, all on the reader's thread

    def _read(self) -> None:
        buffer = bytearray()
        try:
            while data := self._receive():
                buffer += data
                while (message := self._take(buffer)) is not None:
                    self._dispatch(message)
        except OSError:
            pass  # closed under us: the same as the end
        finally:
            self._end()

    def _receive(self) -> bytes:
        space = socket.CMSG_SPACE(4 * _MOST_DESCRIPTORS)
        data, ancillary, _, _ = self._socket.recvmsg(1 << 16, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) // 4 * 4])
                self._incoming += received
        return data

    @staticmethod
    def _take(buffer: bytearray) -> dict[str, Any] | None:
        if len(buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(buffer)
        if length > _LONGEST_BYTES:
            raise OSError(f"a message of {length} bytes")
        end = _LENGTH.size + length
        if len(buffer) < end:
            return None
        message: dict[str, Any] = json.loads(bytes(buffer[_LENGTH.size : end]))
        del buffer[:end]
        return message

    def _dispatch(self, message: dict[str, Any]) -> None:
        fds, count = self._incoming, message.get("fds", 0)
        taken, self._incoming = fds[:count], fds[count:]
        if "note" in message:
            self._handlers[message["note"]](**message["args"])
        elif "call" in message:
            self._begin_answer(message, taken)
        else:
            self._settle(message, taken)

    def _begin_answer(self, message: dict[str, Any], fds: list[int]) -> None:
        name = message["call"]
        thread = threading.Thread(target=self._answer, args=(message, fds), name=name, daemon=True)
        thread.start()
        if name in self._completed:
            self._at_work = [thread, *(other for other in self._at_work if other.is_alive())]

    def _answer(self, message: dict[str, Any], fds: list[int]) -> None:
        arguments = dict(message["args"])
        if fds:
            arguments["fds"] = fds
        reply: dict[str, Any] = {"id": message["id"]}
        send: Sequence[int] = ()
        try:
            result = self._handlers[message["call"]](**arguments)
            if (
                isinstance(result, tuple)
                and len(result) == 2
                and isinstance(result[1], Descriptors)
            ):
                result, send = result
            reply["result"] = result
        except PostcopyError as error:
            reply["error"] = {"class": type(error).__name__, "text": str(error)}
        except Exception as error:  # a fault of ours: the caller must not wait for ever
            text = f"internal error in {message['call']}: {error!r}; please report it"
            reply["error"] = {"class": "PostcopyError", "text": text}
        reply["fds"] = len(send)
        self._send(reply, send)

    def _settle(self, message: dict[str, Any], fds: list[int]) -> None:
        answer = self._waiting.get(message["id"])
        if answer is None:
            return  # the caller gave up waiting
        if "error" in message:
            answer.give(None, _revive(message["error"]))
        else:
            answer.give((message["result"], fds) if fds else message["result"])

    def _end(self) -> None:
        with self._waiting_lock:
            self._ended = True
            waiting = list(self._waiting.values())
        for answer in waiting:
            answer.give(None, EngineDied("the other process is gone"))
        for thread in self._at_work:
            thread.join()
        self._socket.close()
        try:
            self._on_end()
        finally:
            self._over.set()


def _revive(error: Mapping[str, str]) -> PostcopyError:
    """Make the exception that the other end raised, without running its constructor."""
    found = getattr(errors, error["class"], PostcopyError)
    kind: type[PostcopyError] = found if issubclass(found, PostcopyError) else PostcopyError
    revived = kind.__new__(kind)
    Exception.__init__(revived, error["text"])
    return revived
