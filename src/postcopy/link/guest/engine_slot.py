"""The engine at work for one guest, and what takes its place when it has died."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from postcopy.errors import EngineDied, HostCannot, PostcopyError, WrongState
from postcopy.guest import AddressSpace
from postcopy.kernel import threads
from postcopy.link.guest.engine_process import EnginePool, EngineProcess
from postcopy.link.guest.watchdog import HANG_LOOKS
from postcopy.link.protocol import JobCommands
from postcopy.link.rpc import Handler, Link
from postcopy.trace import trace

_P = ParamSpec("_P")
_R = TypeVar("_R")

AHEAD_S: Final = 5.0
"""When a successor is started: most migrations are over by then, and need the CPUs until then."""

_MOST_STARTS: Final = 3
"""Engines to take, one after the other, for one that lives when it is put to work."""

_MOST_REPLACEMENTS: Final = 5
"""Engines to start, one after the other, when none lives to get anywhere."""

_MOST_A_MINUTE: Final = 20
"""Engines to start when each gets somewhere, and none far."""


_A_MINUTE_S: Final = 60.0


class EngineSlot:
    """At most one engine is at work; the next is started ahead.

    :param handlers: the calls that a new engine may make.
    :param on_end: called when an engine's link has ended, at whichever end.
    :param pool: where they come from.
    :param hang_looks: when one hangs: see :mod:`postcopy.link.guest.watchdog`.
    :param may_call: whether the calling thread holds no lock that an engine's answer may need.
    """

    def __init__(
        self,
        handlers: Callable[[EngineProcess], Mapping[str, Handler]],
        on_end: Callable[[EngineProcess], None],
        pool: EnginePool | None = None,
        hang_looks: int = HANG_LOOKS,
        may_call: Callable[[], bool] = lambda: True,
    ) -> None:
        self._handlers = handlers
        self._on_end = on_end
        self._pool = pool or EnginePool()
        self._hang_looks = hang_looks
        self._may_call = may_call
        self._lock = threading.Lock()
        # Under the lock: the one at work, and whether there may be any.
        self.current: EngineProcess | None = None
        self._closed = False

    def prepare(self, delay_s: float = 0.0) -> None:
        """Have one ready, after a while."""
        self._pool.prepare(delay_s)

    def start(self) -> Link:
        """Put a fresh engine to work; one that has died before it got anything to do is replaced.

        :raises WrongState: closed: an engine that is started now would never be ended.
        :raises EngineDied: they die one after the other.
        :raises HostCannot: the host has no room for one.
        """
        for _ in range(_MOST_STARTS):
            engine = self._pool.take()
            self._put_to_work(engine)
            # Not under the lock: what is called when the link ends may take it.
            try:
                link = engine.connect(self._handlers(engine), partial(self._on_end, engine))
                link.may_call = self._may_call
                engine.watch(self._hang_looks)
                trace("guest.engine-started", engine=engine.process_id)
                return link
            except EngineDied:
                self.drop(engine)
            except HostCannot:
                self.drop(engine)
                raise
        raise EngineDied("engine processes die before they get anything to do")

    def _put_to_work(self, engine: EngineProcess) -> None:
        with self._lock:
            if not self._closed:
                self.current = engine
                return
        engine.end()
        raise WrongState("this process is leaving: no engine is started any more")

    def drop(self, engine: EngineProcess) -> None:
        """Let go of an engine that has died, unless another is at work by now."""
        with self._lock:
            if self.current is not engine:
                return
            self.current = None
        engine.end()

    def call(
        self, order: Callable[Concatenate[Any, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Have the engine at work do something.

        :raises EngineDied: there is none, or it has died; then that has been dealt with on return.
        """
        link = self.link
        if link is None:
            raise EngineDied(f"{order.__name__}: no engine is at work")
        try:
            return link.call(order, *args, **kwargs)
        except EngineDied:
            link.wait_over()
            raise

    def adopt(
        self, order: Callable[Concatenate[Any, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> tuple[Link, _R]:
        """Put an engine in place of one that has died, and have it go on.

        :return: the link to it, and its answer to ``order``.
        :raises PostcopyError: it cannot; no engine is at work then.
        """
        link = self.start()
        try:
            return link, link.call(order, *args, **kwargs)
        except PostcopyError:
            self.end()
            link.wait_over()  # its end is not to be taken for that of the next
            raise

    @property
    def link(self) -> Link | None:
        """The link to the engine at work."""
        engine = self.current
        return engine.link if engine is not None else None

    def tell(
        self, order: Callable[Concatenate[Any, _P], None], *args: _P.args, **kwargs: _P.kwargs
    ) -> None:
        """Tell the engine at work, if there is one, without waiting for an answer."""
        link = self.link
        if link is not None:
            link.note(order, *args, **kwargs)

    def share(self, space: AddressSpace) -> None:
        """One more process has the guest's memory mapped, while pages of it are missing."""
        with suppress(EngineDied):  # the next one is told when it begins
            self.call(JobCommands.share, space)

    def end(self) -> None:
        """Let go of the engine at work: what it may still say counts no more."""
        with self._lock:
            engine, self.current = self.current, None
        if engine is not None:
            engine.end()

    def close(self) -> None:
        """Let go of the one that is ready, too; none is started any more."""
        with self._lock:
            self._closed = True
        self.end()
        self._pool.close()


class EngineSupervisor:
    """Puts an engine in place of a dead one, unless they die one after the other.

    :param wanted: whether one is needed still; asked under :attr:`lock`.
    :param adopt: starts one that goes on where the dead one was.
    :param failed: gets the reason when none could go on.
    :param ahead: has an engine started, after so many seconds: a guest waits when one dies.
    """

    def __init__(
        self,
        wanted: Callable[[], bool],
        adopt: Callable[[], None],
        failed: Callable[[PostcopyError], None],
        ahead: Callable[[float], None],
    ) -> None:
        self._ahead = ahead
        self._wanted = wanted
        self._adopt = adopt
        self._failed = failed
        self._replacements = 0
        self._deaths_s: deque[float] = deque(maxlen=_MOST_A_MINUTE + 1)  # monotonic, the last ones
        self.lock = threading.Lock()
        """Held while an engine is put in place of a dead one."""

    def begin(self) -> None:
        """Have the dead one replaced, by a thread of its own."""
        thread = threading.Thread(target=self._replace, name="replace-engine", daemon=True)
        try:
            threads.start(thread)
        except HostCannot as error:
            self._failed(error)

    def worked(self) -> None:
        """The engine at work has got somewhere: count anew, and have a successor ready in a while."""
        self._replacements = 0
        self._ahead(AHEAD_S)

    def count_anew(self) -> None:
        """A user has ordered one: those that have died before are of no account."""
        self._deaths_s.clear()
        self.worked()

    @property
    def tries_left(self) -> bool:
        """Whether to begin again, after those that have died: the one too many gives up, and says so."""
        return self._replacements <= _MOST_REPLACEMENTS and not self._die_too_fast

    @property
    def _die_too_fast(self) -> bool:
        times_s = self._deaths_s
        return len(times_s) == times_s.maxlen and times_s[-1] - times_s[0] < _A_MINUTE_S

    def _replace(self) -> None:
        with self.lock:
            self._replacements += 1
            self._deaths_s.append(time.monotonic())
            if not self._wanted():
                return
            try:
                if not self.tries_left:
                    raise EngineDied("they die one after the other")
                self._adopt()
            except PostcopyError as error:
                self._failed(error)
