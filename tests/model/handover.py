"""The hand-over of a guest as a small model: both sides, what is under way, and everything that breaks.

Each side has the real table of :mod:`postcopy.ownership`, not a copy: a step that the table refuses does
not happen here either.  The model knows nothing of pages.  A state is: the owner on each side and whether
its vCPUs run, how far each engine has come, the messages under way in each direction, and how much may
still break.  :func:`moves` gives every state that can follow; a test explores them all.

An owner lives in the guest's process and outlives its engine.  An engine may die, or one of its calls fail,
between any two of its steps, and the link may break with any part of the messages under way delivered or
lost.  A user may give any order at any time.

The steps are those of :mod:`postcopy.trace`, where the real engines can be made to die.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from postcopy.ownership import HERE, MOVES, RUNS, Move, Owner

# The source's engine, in order.
IDLE, SENDS, STOPPED, GIVEN_UP, HANDED_OVER, KNOWS = (
    "idle",
    "sends",
    "stopped",
    "given-up",
    "handed-over",
    "knows",
)
# Its ends, and the pause.
PAUSED, FAILED, COMPLETED, RECOVERS = "paused", "failed", "completed", "recovers"
CANCELLED = "cancelled"
ALL_SENT, DONE = "all-sent", "done"
"""Every page has been sent; the destination is known to have every page."""
# The destination's engine, in order.
WAITS, LOADED, OWNS, RUNS_THERE, WHOLE = "waits", "loaded", "owns", "runs", "whole"

ENDS = frozenset({IDLE, FAILED, COMPLETED, CANCELLED})
PRECOPY, POSTCOPY, PIPE, FILE, SNAPSHOT = "precopy", "postcopy", "pipe", "file", "snapshot"
"""What is ordered: a snapshot, and a migration into a file, have no destination; that of a pipe does not
answer."""


@dataclass(frozen=True)
class Side:
    """One side.

    :ivar step: how far its engine has come.
    :ivar owner: what the table in the guest's process says.
    :ivar runs: the vCPUs run.
    :ivar stopped: its user has said ``stop``.
    :ivar done: at the source: the destination is known to have every page.
    :ivar whole: at the destination: no page is missing, and its memory is watched no more.
    :ivar watched: at the destination: a missing page makes its reader wait.
    :ivar ended: its process has ended, by a user's order.
    """

    step: str
    owner: Owner
    runs: bool = False
    stopped: bool = False
    done: bool = False
    whole: bool = False
    watched: bool = False
    ended: bool = False

    def after(self, move: Move, **changes: object) -> "Side | None":
        """Where a move leads by the table; None where the table refuses it."""
        to = MOVES[move].get(self.owner)
        return None if to is None else replace(self, owner=to, **changes)


@dataclass(frozen=True)
class State:
    """All there is."""

    kind: str
    source: Side = Side(IDLE, Owner.OURS, runs=True)
    destination: Side = Side(WAITS, Owner.AWAITED)
    up: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    linked: bool = True
    breaks: int = 2
    deaths: int = 2
    orders: int = 3

    @property
    def answered(self) -> bool:
        """Whether there is a destination that answers."""
        return self.kind in {PRECOPY, POSTCOPY}

    @property
    def read(self) -> bool:
        """Whether a machine at the other end starts the guest by itself."""
        return self.answered or self.kind == PIPE

    @property
    def postcopy(self) -> bool:
        """Whether the guest runs at the destination before all of its pages are there."""
        return self.kind == POSTCOPY

    @property
    def running(self) -> int:
        """How many run the guest."""
        return self.source.runs + self.destination.runs

    @property
    def owned(self) -> int:
        """How many say that the guest is theirs."""
        sides = (self.source, self.destination)
        return sum(side.owner in HERE and not side.ended for side in sides)

    @property
    def held(self) -> bool:
        """Whether a user who sees both sides may, and must, say ``cont`` at the source."""
        return self.source.owner in {Owner.UNKNOWN, Owner.SAVED} and not self.source.ended

    @property
    def recoverable(self) -> bool:
        """Whether ``migrate-recover`` and ``migrate -r`` can bring it together again."""
        source, destination = self.source, self.destination
        return (
            source.step == PAUSED
            and destination.step == PAUSED
            and source.after(Move.RESUME) is not None
            and not (source.ended or destination.ended)
        )


def moves(state: State) -> Iterator[tuple[str, State]]:
    """Every step that a side, the network, a user or a killer can take."""
    if not state.source.ended:
        yield from _source_moves(state)
    if not state.destination.ended:
        yield from _destination_moves(state)
    yield from _harm(state)
    if state.orders:
        yield from _orders(replace(state, orders=state.orders - 1))
    if state.recoverable:
        yield "recover", _recovered(state)
    yield from _what_a_user_sees(state)


# --- the source's engine


def _source_moves(state: State) -> Iterator[tuple[str, State]]:
    source = state.source
    if source.step == SENDS:
        # A stop that the table refuses has parked the vCPUs all the same, and the engine lets them run.
        yield from _made(state, source.after(Move.STOP, step=STOPPED, runs=False), "stop")
    elif source.step == STOPPED:
        yield from _before_the_last_byte(state)
    elif source.step == GIVEN_UP:
        yield from _last_byte(state)
    elif source.step == HANDED_OVER and state.kind == PIPE:
        yield "written", _saved(state)
        # A command that fails, a description that is not taken: nothing says what has been read.
        yield "not written", _source_breaks(_cut(state))
    elif state.linked:
        yield from _source_ends(state)
    yield from _source_hears(state)
    if source.step in {SENDS, STOPPED} and state.read and not state.linked:
        yield "the link is gone", _back(state)
    if (
        source.step in {GIVEN_UP, HANDED_OVER, KNOWS, ALL_SENT, DONE, RECOVERS}
        and state.answered
        and not state.linked
        and not state.down
    ):
        yield "the link is gone", _source_breaks(state)


def _last_byte(state: State) -> Iterator[tuple[str, State]]:
    if not state.read:
        yield "written", _saved(state)
        yield "not written", _back(state)
    elif state.linked:
        what = "package" if state.postcopy else "end"
        yield what, _source(replace(state, up=(*state.up, what)), step=HANDED_OVER)
    else:
        # A send that fails has not delivered the last byte: the only certainty a broken link can give.
        yield "not sent", _back(state)


def _saved(state: State) -> State:
    """Nothing more is written; an engine of which the table refuses that has failed."""
    saved = state.source.after(Move.SAVE)
    if saved is None:
        return _back(state)
    return _completed_at_source(replace(state, source=saved))


def _source_ends(state: State) -> Iterator[tuple[str, State]]:
    if state.source.step == KNOWS:
        yield "all sent", _source(replace(state, up=(*state.up, "all-sent")), step=ALL_SENT)
    elif state.source.step == DONE and "last word" not in state.up:
        yield "last word", replace(state, up=(*state.up, "last word"))


def _before_the_last_byte(state: State) -> Iterator[tuple[str, State]]:
    source = state.source
    if state.linked and not state.answered:
        yield from _given_up(state)
    elif state.postcopy or "taken" in state.down:
        rest = tuple(m for m in state.down if m != "taken")
        yield from _given_up(replace(state, down=rest))
    elif state.linked and "rest" not in state.up and state.destination.step == WAITS:
        yield "rest", replace(state, up=("rest",))
    if source.after(Move.GIVE_UP) is None:
        yield "cancelled", _back(state, CANCELLED)


def _given_up(state: State) -> Iterator[tuple[str, State]]:
    yield from _made(state, state.source.after(Move.GIVE_UP, step=GIVEN_UP), "give up")


def _source_hears(state: State) -> Iterator[tuple[str, State]]:
    if not state.down:
        return
    message, rest = state.down[0], replace(state, down=state.down[1:])
    step = state.source.step
    if message == "refused" and step in {SENDS, STOPPED, HANDED_OVER}:
        yield "refused", _back(rest)
    elif message in {"package-taken", "bitmap"} and step in {HANDED_OVER, RECOVERS}:
        yield from _made(rest, rest.source.after(Move.TAKEN, step=KNOWS), message)
    elif message == "nothing missing" and step == ALL_SENT:
        yield from _made(rest, rest.source.after(Move.MOVED, step=DONE, done=True), message)
    elif message == "arrived" and step in {HANDED_OVER, DONE}:
        yield "arrived", _completed_at_source(rest)


def _completed_at_source(state: State) -> State:
    """The engine says so, and ends; what was saved stays saved, and what was cancelled is here."""
    source = replace(state.source, step=COMPLETED)
    return replace(state, source=source.after(Move.MOVED) or source)


def _back(state: State, step: str = FAILED) -> State:
    """Its engine takes the guest back, and lets it run unless its user has stopped it."""
    taken = state.source.after(Move.TAKE_BACK, step=step)
    if taken is None:
        return _source(state, step=step)
    return replace(state, source=_let_run(taken))


def _source_breaks(state: State) -> State:
    if state.source.owner is Owner.MOVED:
        return _source(state, step=COMPLETED)
    source = replace(state.source, step=PAUSED if state.postcopy else FAILED)
    return replace(state, source=source.after(Move.LOSE_TOUCH) or source)


# --- the destination's engine


def _destination_moves(state: State) -> Iterator[tuple[str, State]]:
    destination = state.destination
    if destination.step == WAITS:
        yield from _destination_hears(state)
    elif destination.step == LOADED and state.postcopy:
        # First its own process is told, then the source.
        owned = destination.after(Move.ARRIVING, step=OWNS)
        yield from _made(state, owned, "own", at="destination")
    elif destination.step == LOADED:
        yield from _made(
            state, _arrived(destination, step=RUNS_THERE, whole=True), "resume", at="destination"
        )
        yield "refuse", _refused(state)
    elif destination.step == OWNS:
        arrived = _arrived(destination, step=RUNS_THERE, watched=True)
        yield from _made(_say(state, "package-taken"), arrived, "resume", at="destination")
    elif destination.step == RUNS_THERE and not state.postcopy:
        yield "arrive", _destination(_say(state, "arrived"), step=COMPLETED)
    elif destination.step in {RUNS_THERE, WHOLE}:
        yield from _destination_ends(state)
    elif destination.step == FAILED:
        # The engine's last call may still be loading devices when its guest is given up.
        yield from _made(state, _arrived(destination), "late resume", at="destination")
    if not state.linked and not state.up and state.read:
        yield from _destination_breaks(state)


def _arrived(side: Side, **changes: object) -> Side | None:
    arrived = side.after(Move.ARRIVE, **changes)
    return None if arrived is None else _let_run(arrived)


def _refused(state: State) -> State:
    """Its engine says so to both: the guest's process abandons first."""
    failed = replace(state.destination, step=FAILED)
    return replace(_say(state, "refused"), destination=failed.after(Move.ABANDON) or failed)


def _destination_breaks(state: State) -> Iterator[tuple[str, State]]:
    step = state.destination.step
    if step == WAITS:
        failed = replace(state.destination, step=FAILED)
        yield "the link is gone", replace(state, destination=failed.after(Move.ABANDON) or failed)
    elif step == RUNS_THERE and state.postcopy:
        yield "the link is gone", _destination(state, step=PAUSED)
    elif step == WHOLE:
        yield "the link is gone", _destination(state, step=COMPLETED)


def _destination_ends(state: State) -> Iterator[tuple[str, State]]:
    message, rest = state.up[:1], replace(state, up=state.up[1:])
    if message == ("all-sent",) and state.destination.step == RUNS_THERE:
        # First nothing is missing any more, then it is said.
        whole = _say(rest, "nothing missing")
        yield "whole", _destination(whole, step=WHOLE, whole=True, watched=False)
    elif message == ("last word",) and state.destination.step == WHOLE:
        yield "arrive", _destination(_say(rest, "arrived"), step=COMPLETED)


def _destination_hears(state: State) -> Iterator[tuple[str, State]]:
    if not state.up:
        return
    message, rest = state.up[0], replace(state, up=state.up[1:])
    if message == "rest":
        yield "rest", _say(rest, "taken")
        yield "refuse", _refused(rest)
    elif message in {"package", "end"}:
        yield message, _destination(rest, step=LOADED)
        yield "refuse", _refused(rest)


def _say(state: State, message: str) -> State:
    heard = state.linked and state.answered
    return replace(state, down=(*state.down, message)) if heard else state


# --- orders of a user


def _orders(state: State) -> Iterator[tuple[str, State]]:
    source, destination = state.source, state.destination
    if not source.ended:
        yield from _outgoing(state)
        yield from _stop_and_cont(state, source, "source")
        gone = replace(source, ended=True, runs=False)
        yield "quit the source", replace(_cut(state), source=gone)
    if not destination.ended:
        yield from _stop_and_cont(state, destination, "destination")
        gone = replace(destination, ended=True, runs=False)
        yield "quit the destination", replace(_cut(state), destination=gone)


def _outgoing(state: State) -> Iterator[tuple[str, State]]:
    source = state.source
    if source.step in ENDS and state.destination.step == WAITS and state.linked:
        if state.kind == SNAPSHOT:
            if source.owner in HERE:
                yield "snapshot", _source(state, step=COMPLETED)
        else:
            yield from _made(state, source.after(Move.ORDER, step=SENDS), "migrate")
    if source.step not in ENDS and source.step != PAUSED:
        yield from _made(state, source.after(Move.CANCEL), "cancel")


def _stop_and_cont(state: State, side: Side, name: str) -> Iterator[tuple[str, State]]:
    stopped = replace(side, stopped=True, runs=False)
    yield f"stop the {name}", replace(state, **{name: stopped})
    if side.owner in {Owner.AWAITED, Owner.ARRIVING, Owner.ABANDONED}:
        yield f"cont the {name}", replace(state, **{name: replace(side, stopped=False)})
        return
    if side.owner in {Owner.UNKNOWN, Owner.SAVED}:
        return  # a user looks at the other side first: see _what_a_user_sees
    changed = side.after(Move.CONT, stopped=False)
    if changed is not None:
        yield f"cont the {name}", replace(state, **{name: _let_run(changed)})


def _what_a_user_sees(state: State) -> Iterator[tuple[str, State]]:
    """What the advice of the owner says, of which both sides are looked at first."""
    source, destination = state.source, state.destination
    if source.ended or not state.held or source.step not in {*ENDS, PAUSED}:
        return
    nobody_runs_it = not state.read or destination.ended or destination.step == FAILED
    if nobody_runs_it and destination.owner not in HERE:
        taken = source.after(Move.CONT, stopped=False)
        if taken is not None:
            yield "cont", replace(state, source=_let_run(replace(taken, step=FAILED)))
    elif destination.step == COMPLETED:
        yield from _made(state, source.after(Move.MOVED, step=COMPLETED), "x-migrate-arrived")


# --- what breaks


def _harm(state: State) -> Iterator[tuple[str, State]]:
    if state.linked and state.breaks and state.read:
        # What was under way may still arrive, all or in part; nothing new is sent.
        broken = replace(state, linked=False, breaks=state.breaks - 1)
        for up in range(len(state.up) + 1):
            for down in range(len(state.down) + 1):
                yield "break", replace(broken, up=state.up[:up], down=state.down[:down])
    if not state.deaths:
        return
    fewer = replace(state, deaths=state.deaths - 1)
    if state.source.step not in {*ENDS, PAUSED} and not state.source.ended:
        yield "the source's engine dies", _source_dies(replace(_cut(fewer), down=()))
    waits = state.destination.step in {*ENDS, PAUSED} or state.destination.ended
    if state.read and not waits:
        yield "the destination's engine dies", _destination_dies(replace(_cut(fewer), up=()))


def _cut(state: State) -> State:
    return replace(state, linked=False) if state.read else state


def _source_dies(state: State) -> State:
    """What its guest's process makes of it; another engine is started by the recovery."""
    ended = state.source.after(Move.END, step=FAILED)
    if ended is not None:
        return replace(state, source=_let_run(ended))
    if state.source.owner in HERE:
        return replace(state, source=_let_run(replace(state.source, step=CANCELLED)))
    return _source_breaks(state)


def _destination_dies(state: State) -> State:
    destination = state.destination
    if destination.owner in HERE and not destination.watched:
        return _destination(state, step=COMPLETED)
    if destination.owner is Owner.ARRIVING:
        # Its devices are loaded: the guest's process runs it.
        arrived = _arrived(destination, step=PAUSED, watched=True)
        assert arrived is not None
        return replace(state, destination=arrived)
    if destination.owner in HERE:
        return _destination(state, step=PAUSED)
    failed = replace(destination, step=FAILED)
    return replace(state, destination=failed.after(Move.ABANDON) or failed)


def _recovered(state: State) -> State:
    """Both are connected anew; the destination answers with what it has."""
    again = replace(state, linked=True, up=(), down=("bitmap",))
    source = state.source.after(Move.RESUME, step=RECOVERS)
    assert source is not None
    return _destination(replace(again, source=source), step=RUNS_THERE)


# --- states made from others


def _let_run(side: Side) -> Side:
    return replace(side, runs=side.owner in RUNS and not side.stopped)


def _made(
    state: State, side: Side | None, name: str, at: str = "source"
) -> Iterator[tuple[str, State]]:
    """One step, unless the table refuses it."""
    if side is not None:
        yield name, replace(state, **{at: side})


def _source(state: State, **changes: object) -> State:
    return replace(state, source=replace(state.source, **changes))


def _destination(state: State, **changes: object) -> State:
    return replace(state, destination=replace(state.destination, **changes))
