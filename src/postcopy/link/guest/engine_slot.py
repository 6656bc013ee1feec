"""Where engines come from, and the one that is at work for a guest.

Starting an interpreter and importing numpy takes a tenth of a second or two.  So one engine is always
started ahead: it waits, idle, for a job.
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from postcopy.errors import EngineDied, HostCannot, PostcopyError, WrongState
from postcopy.guest import AddressSpace
from postcopy.kernel import threads
from postcopy.link.guest.engine_process import EngineProcess
from postcopy.link.guest.watchdog import HANG_LOOKS
from postcopy.link.protocol import JobCommands
from postcopy.link.rpc import Answer, Handler, Link
from postcopy.trace import trace

_P = ParamSpec("_P")
_R = TypeVar("_R")

AHEAD_S: Final = 5.0
"""When a successor is started: most migrations are over by then, and need the CPUs until then."""

_MOST_STARTS: Final = 3
"""Engines to take, one after the other, for one that lives when it is put to work."""


class EnginePool:
    """Hands out engines, and starts the next one ahead.

    :param first: one that has been started already.
    """

    def __init__(self, first: EngineProcess | None = None) -> None:
        self._lock = threading.Lock()
        # Under the lock: the one that waits, what is going to start it, and all that may live.
        self._spare = first
        self._living = [] if first is None else [first]
        self._timer: threading.Timer | None = None
        self._closed = False

    def prepare(self, delay_s: float = 0.0) -> None:
        """Have one ready, unless the pool is closed, or the host has no room for one now.

        :param delay_s: when to begin: a guest that has just arrived needs the CPU for itself.
        """
        if not delay_s:
            with suppress(HostCannot):  # the order that needs one will say so
                self._prepare_now()
            return
        with self._lock:
            self._cancel_timer()
            if self._spare is None and not self._closed:
                timer = threading.Timer(delay_s, self.prepare)
                timer.daemon = True
                self._timer = timer if threads.start_if_possible(timer) else None

    def _prepare_now(self) -> None:
        with self._lock:
            self._cancel_timer()
            if self._spare is None and not self._closed:
                self._spare = self._start()

    def _start(self) -> EngineProcess:
        engine = EngineProcess.start()
        self._living = [engine, *(other for other in self._living if not other.is_dead)]
        return engine

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def ask(
        self, order: Callable[Concatenate[Any, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> Answer[_R]:
        """Have the next one do something for which it needs no guest: see :meth:`EngineProcess.ask`."""
        self._prepare_now()
        with self._lock:
            spare = self._spare
        if spare is None:
            raise EngineDied(f"{order.__name__}: no engine is started any more")
        return spare.ask(order, *args, **kwargs)

    def take(self) -> EngineProcess:
        """Return a fresh engine.

        :raises HostCannot: the host has no room for one.
        """
        with self._lock:
            engine, self._spare = self._spare, None
            if engine is None or engine.is_dead:
                dead, engine = engine, self._start()
                if dead is not None:
                    dead.end()
            return engine

    def close(self) -> None:
        """Let the one that waits go."""
        with self._lock:
            self._closed = True
            self._cancel_timer()
            if self._spare is not None:
                self._spare.end()
                self._spare = None

    def kill_left(self, within_s: float) -> None:
        """Kill those that hang: a process that is leaving leaves none behind.

        :param within_s: how long the others may take for their last words.
        """
        until_s = time.monotonic() + within_s
        with self._lock:
            living = list(self._living)
        for engine in living:
            engine.kill_unless_dead_within(max(0.0, until_s - time.monotonic()))


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
        # Adopting has one order at a time.
        self.restarts = 0
        """Engines that went on in place of one that had died."""

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
            found = link.call(order, *args, **kwargs)
        except PostcopyError:
            self.end()
            link.wait_over()  # its end is not to be taken for that of the next
            raise
        self.restarts += 1
        return link, found

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
