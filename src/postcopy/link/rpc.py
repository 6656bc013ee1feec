"""Calls and notes between two processes, of messages that are declared in :mod:`postcopy.link.protocol`.

Both ends may call at any time; each call is answered by a thread that does nothing else meanwhile, so that
one which waits (for a missing page, say) holds up no other.  Notes have no answer and keep their order.

What cannot be sent or taken is told to the caller.  Where nothing can be told, as of a note, the link
ends: either side knows how to go on without the other, and none how to go on after a lost message.
"""

import itertools
import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from postcopy import errors
from postcopy.errors import EngineDied, HostCannot, PostcopyError
from postcopy.kernel import calls, threads
from postcopy.link.messages import Messages, Received
from postcopy.link.protocol import CODEC, is_note, messages
from postcopy.link.workers import Workers

Handler = Callable[..., Any]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")


def handlers(interface: type[_T], implementation: _T) -> dict[str, Handler]:
    """What the other end may send of an interface, and what is done then: the methods of its names."""
    return {name: getattr(implementation, name) for name in messages(interface)}


def senders(interface: type[Any], link: "Link") -> dict[str, Handler]:
    """The messages of an interface, by name: each is sent to the other end, and its answer returned."""
    return {
        name: partial(link.note if is_note(message) else link.call, message)
        for name, message in messages(interface).items()
    }


class Answer(Generic[_R]):
    """What a call waits for; from any thread.

    :param forget: lets go of what may still come; returns whether nothing has.
    """

    def __init__(self, forget: Callable[[], bool] = lambda: True) -> None:
        self._come = threading.Event()
        self._forget = forget
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

    def wait(self, timeout_s: float | None = None) -> _R:
        """The other end's answer.

        :raises EngineDied: the other process is gone.
        :raises PostcopyError: whatever the other end raised, by its own class where it has one here.
        :raises TimeoutError: no answer came in time; one that comes later counts for nothing.
        """
        if not self._come.wait(timeout_s):
            if self._forget():
                raise TimeoutError(f"no answer within {timeout_s} s")
            self._come.wait()  # it is just coming, with descriptors maybe
        if self._error is not None:
            raise self._error
        result: _R = self._result
        return result


class Link:
    """One end of the link.

    :param handlers: what the other end may call, and the notes that it may send, by name; each
        is called with the message's arguments.
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
        self._messages = Messages(connection)
        self._handlers = dict(handlers)
        self._on_end = on_end
        self._completed = completed
        # The reader's alone: the ends of those that may be at work.
        self._at_work: list[threading.Event] = []
        self._workers = Workers(f"{name}-answers")
        self._taking = False
        self._over = threading.Event()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        # Under the lock: calls whose answer has not come, and whether none will come any more.
        self._waiting: dict[int, Answer[Any]] = {}
        self._ended = False
        self.may_call: Callable[[], bool] = lambda: True
        """Whether the calling thread holds no lock that the answer may need: it would wait for ever."""
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)

    def serve(
        self, handlers: Mapping[str, Handler], *, completed: frozenset[str] = frozenset()
    ) -> None:
        """Let the other end call and send these, too."""
        self._completed |= completed
        self._handlers.update(handlers)

    def start(self) -> None:
        """Begin to take messages.

        :raises HostCannot: there can be no more threads.
        """
        self._workers.start()
        try:
            threads.start(self._reader)
        except HostCannot:
            self._workers.end()
            raise

    def call(
        self, message: Callable[Concatenate[Any, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Ask the other end and wait for its answer.

        :param message: the method that declares it.
        :raises EngineDied: the other process is gone.
        :raises KernelError: the message cannot be sent.
        :raises HostCannot: a process has no room for the descriptors that go along.
        :raises PostcopyError: whatever the other end raised, by its own class where it has one here.
        """
        return self.ask(message, *args, **kwargs).wait()

    def ask(
        self, message: Callable[Concatenate[Any, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> Answer[_R]:
        """Call the other end, and do something else until it answers.

        :raises EngineDied: the other process is gone.
        :raises KernelError: the message cannot be sent.
        """
        name, number = message.__name__, next(self._numbers)
        if not self.may_call():
            raise RuntimeError(f"{name} is called under a lock that its answer may need")
        answer = Answer[_R](lambda: self._forget(number) is not None)
        with self._lock:
            if self._ended:
                raise EngineDied(f"{name}: the other process is gone")
            self._waiting[number] = answer
        try:
            self._send({"call": name, "id": number}, args=[list(args), kwargs])
        except BaseException:
            self._forget(number)
            raise
        return answer

    def _forget(self, number: int) -> Answer[Any] | None:
        with self._lock:
            return self._waiting.pop(number, None)

    def note(
        self, message: Callable[Concatenate[Any, _P], None], *args: _P.args, **kwargs: _P.kwargs
    ) -> None:
        """Tell the other end; there is no answer.  Silently nothing when the other end is gone."""
        self._send_or_end({"note": message.__name__}, args=[list(args), kwargs])

    def _send(self, body: dict[str, Any], **values: Any) -> None:
        fds: list[int] = []
        encoded = CODEC.encode(values, fds)
        self._messages.send(body | encoded, fds)

    def _send_or_end(self, body: dict[str, Any], **values: Any) -> None:
        try:
            self._send(body, **values)
        except EngineDied:
            pass  # the reader sees it as well
        except PostcopyError as error:
            _warn("the link ends, since a message cannot be sent: %s", error)
            self.close()

    def close(self) -> None:
        """End the link; calls that wait fail with :class:`EngineDied`."""
        self._messages.shut()

    def wait_over(self, timeout_s: float | None = None) -> bool:
        """Wait until the other end is gone and ``on_end`` has returned; not from a handler.

        :return: whether that is so.
        """
        return self._over.wait(timeout_s)

    @property
    def is_taking(self) -> bool:
        """Whether this end is at work on what has come, and hears nothing meanwhile."""
        return self._taking

    # --- receiving, all on the reader's thread

    def _read(self) -> None:
        try:
            for message in self._messages.receive():
                self._taking = True
                self._dispatch(message)
                self._taking = False
        except OSError:
            pass  # closed under us: the same as the end
        finally:
            self._end()

    def _dispatch(self, message: Received) -> None:
        body = message.body
        if "note" in body:
            self._take_note(body["note"], body["args"])
        elif "call" in body:
            self._begin_answer(message)
        else:
            self._settle(message)

    def _take_note(self, name: str, arguments: Any) -> None:
        try:
            args, kwargs = CODEC.decode(arguments, [])
            self._handlers[name](*args, **kwargs)
        except PostcopyError as error:
            _warn("%s comes at the wrong time: %s", name, error)
        except Exception:  # a fault of ours: what was told would be missing for ever
            _warn("the link ends: internal error in %s; please report it", name, exc_info=True)
            self.close()

    def _begin_answer(self, message: Received) -> None:
        name, fds = message.body["call"], message.fds
        if not message.is_whole:
            lost = calls.descriptors_lost(name, message.arrived, message.body["fds"])
            self._refuse(message, lost)
            return
        done = threading.Event()
        try:
            self._workers.give(name, partial(self._answer, message.body, fds, done))
        except HostCannot as error:
            calls.close_all(fds)
            self._refuse(message, error.because(name))
            return
        if name in self._completed:
            self._at_work = [done, *(other for other in self._at_work if not other.is_set())]

    def _refuse(self, message: Received, error: PostcopyError) -> None:
        self._send_or_end({"id": message.body["id"], "error": _packed(error)})

    def _answer(self, body: Mapping[str, Any], fds: list[int], done: threading.Event) -> None:
        try:
            self._make_answer(body, fds)
        finally:
            done.set()

    def _make_answer(self, body: Mapping[str, Any], fds: list[int]) -> None:
        reply: dict[str, Any] = {"id": body["id"]}
        try:
            args, kwargs = CODEC.decode(body["args"], fds)
            self._send(reply, result=self._handlers[body["call"]](*args, **kwargs))
        except PostcopyError as error:
            self._send_or_end(reply | {"error": _packed(error)})
        except Exception as error:  # a fault of ours: the caller must not wait for ever
            text = f"internal error in {body['call']}: {error!r}; please report it"
            self._send_or_end(reply | {"error": _packed(PostcopyError(text))})

    def _settle(self, message: Received) -> None:
        body, fds = message.body, message.fds
        answer = self._forget(body["id"])
        if answer is None:
            calls.close_all(fds)  # the caller gave up waiting
        elif "error" in body:
            answer.give(None, _revive(body["error"]))
        elif not message.is_whole:
            answer.give(None, calls.descriptors_lost("an answer", message.arrived, body["fds"]))
        else:
            answer.give(CODEC.decode(body["result"], fds))

    def _end(self) -> None:
        # What is at work here may wait to send.
        self._messages.shut()
        with self._lock:
            self._ended = True
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.give(None, EngineDied("the other process is gone"))
        for done in self._at_work:
            done.wait()
        self._workers.end()
        self._messages.close()
        try:
            self._on_end()
        finally:
            self._over.set()


def _warn(text: str, *arguments: object, exc_info: bool = False) -> None:
    import logging  # a guest that wakes does not wait for it

    logging.getLogger(__name__).warning(text, *arguments, exc_info=exc_info)


def _packed(error: PostcopyError) -> dict[str, str]:
    return {"class": type(error).__name__, "text": str(error)}


def _revive(error: Mapping[str, str]) -> PostcopyError:
    """Make the exception that the other end raised, without running its constructor."""
    found = getattr(errors, error["class"], PostcopyError)
    kind: type[PostcopyError] = found if issubclass(found, PostcopyError) else PostcopyError
    revived = kind.__new__(kind)
    Exception.__init__(revived, error["text"])
    return revived
