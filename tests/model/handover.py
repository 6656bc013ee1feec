"""The hand-over of a guest as a small model: both sides, what is under way, and everything that breaks.

It knows nothing of pages.  A state is: who may run the guest and who does, how far each side has come,
the messages under way in each direction, and how much may still break.  :func:`moves` gives every state
that can follow; a test explores them all.

What a side *owns* lives in the guest's process and outlives its engine.  An engine may die between any
two of its steps, and the link may break with any part of the messages under way delivered or lost.

The steps are those of :mod:`postcopy.kill_points`, where the real engines can be made to die.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

# The source, in order.
SENDS, STOPPED, GIVEN_UP, HANDED_OVER, KNOWS = (
    "sends",
    "stopped",
    "given-up",
    "handed-over",
    "knows",
)
# Its ends, and the pause.
PAUSED, FAILED, COMPLETED, RECOVERS = "paused", "failed", "completed", "recovers"
ALL_SENT, DONE = "all-sent", "done"
"""Every page has been sent; the destination is known to have every page."""
# The destination, in order.
WAITS, LOADED, OWNS, RUNS, WHOLE = "waits", "loaded", "owns", "runs", "whole"


@dataclass(frozen=True)
class Side:
    """One side: how far its engine is, and what its guest's process knows."""

    step: str
    runs: bool = False
    gave_up: bool = False
    """At the source: only the user, or the destination's own word, brings it back."""
    knows: bool = False
    """At the source: the destination is known to own it, so that not even the user may."""
    done: bool = False
    """At the source: the destination is known to have every page."""
    owns: bool = False
    """At the destination: told to its guest's process."""
    whole: bool = False
    """At the destination: its guest's process watches for missing pages no more."""
    engine: bool = True


@dataclass(frozen=True)
class State:
    """All there is."""

    postcopy: bool
    source: Side = Side(SENDS, runs=True)
    destination: Side = Side(WAITS)
    up: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    linked: bool = True
    breaks: int = 2
    deaths: int = 2

    @property
    def running(self) -> int:
        """How many run the guest."""
        return self.source.runs + self.destination.runs

    @property
    def held(self) -> bool:
        """Whether a user who sees both sides may, and must, say ``cont`` at the source."""
        source = self.source
        return source.step in {PAUSED, FAILED} and source.gave_up and not source.knows

    @property
    def recoverable(self) -> bool:
        """Whether ``migrate-recover`` and ``migrate -r`` can bring it together again."""
        return self.source.step == PAUSED and self.destination.step == PAUSED

    @property
    def to_be_told(self) -> bool:
        """Whether a user who sees both sides may say ``x-migrate-arrived`` at the source."""
        return self.source.step == PAUSED and self.destination.step == COMPLETED


def moves(state: State) -> Iterator[tuple[str, State]]:
    """Every step that either side, the network or a killer can take."""
    yield from _source_moves(state)
    yield from _destination_moves(state)
    yield from _harm(state)
    if state.recoverable:
        yield "recover", _recovered(state)
    if state.to_be_told:
        yield "told", _source(state, step=COMPLETED, knows=True)


# --- the source's engine


def _source_moves(state: State) -> Iterator[tuple[str, State]]:
    source = state.source
    if not source.engine:
        return
    if source.step == SENDS:
        yield "stop", _source(state, step=STOPPED, runs=False)
    elif source.step == STOPPED:
        yield from _before_the_last_byte(state)
    elif source.step == GIVEN_UP:
        what = "package" if state.postcopy else "end"
        if state.linked:
            sent = replace(state, up=(*state.up, what))
            yield what, _source(sent, step=HANDED_OVER)
        elif state.postcopy:
            # A send that fails has not delivered RUN: the only certainty a broken link can give.
            yield "not sent", _back(state)
    elif state.linked:
        yield from _source_ends(state)
    yield from _source_hears(state)
    if source.step in {SENDS, STOPPED} and not state.linked:
        yield "the link is gone", _back(state)
    if (
        source.step in {GIVEN_UP, HANDED_OVER, KNOWS, ALL_SENT, DONE, RECOVERS}
        and not state.linked
        and not state.down
    ):
        yield "the link is gone", _source_breaks(state)


def _source_ends(state: State) -> Iterator[tuple[str, State]]:
    if state.source.step == KNOWS:
        yield "all sent", _source(replace(state, up=(*state.up, "all-sent")), step=ALL_SENT)
    elif state.source.step == DONE and "last word" not in state.up:
        yield "last word", replace(state, up=(*state.up, "last word"))


def _before_the_last_byte(state: State) -> Iterator[tuple[str, State]]:
    if state.postcopy or "taken" in state.down:
        rest = tuple(m for m in state.down if m != "taken")
        yield "give up", _source(replace(state, down=rest), step=GIVEN_UP, gave_up=True)
    elif state.linked and "rest" not in state.up and state.destination.step == WAITS:
        yield "rest", replace(state, up=("rest",))


def _source_hears(state: State) -> Iterator[tuple[str, State]]:
    if not state.down:
        return
    message, rest = state.down[0], replace(state, down=state.down[1:])
    step = state.source.step
    if message == "refused" and step in {SENDS, STOPPED, HANDED_OVER}:
        yield "refused", _back(rest)
    elif message in {"package-taken", "bitmap"} and step in {HANDED_OVER, RECOVERS}:
        yield message, _source(rest, step=KNOWS, knows=True)
    elif message == "nothing missing" and step == ALL_SENT:
        yield message, _source(rest, step=DONE, done=True)
    elif message == "arrived" and step in {HANDED_OVER, DONE}:
        yield "arrived", _source(rest, step=COMPLETED, knows=True)


def _back(state: State) -> State:
    return _source(state, step=FAILED, runs=True, gave_up=False)


def _source_breaks(state: State) -> State:
    if state.source.done:
        return _source(state, step=COMPLETED)
    return _source(state, step=PAUSED if state.postcopy else FAILED)


# --- the destination's engine


def _destination_moves(state: State) -> Iterator[tuple[str, State]]:
    destination = state.destination
    if not destination.engine:
        return
    if destination.step == WAITS:
        yield from _destination_hears(state)
    elif destination.step == LOADED and state.postcopy:
        # First its own process is told, then the source.
        yield "own", _destination(state, step=OWNS, owns=True)
    elif destination.step == LOADED:
        yield "resume", _destination(state, step=RUNS, owns=True, runs=True)
        yield "refuse", _destination(_say(state, "refused"), step=FAILED)
    elif destination.step == OWNS:
        yield "resume", _destination(_say(state, "package-taken"), step=RUNS, runs=True)
    elif destination.step == RUNS and not state.postcopy:
        yield "arrive", _destination(_say(state, "arrived"), step=COMPLETED)
    elif destination.step in {RUNS, WHOLE}:
        yield from _destination_ends(state)
    if not state.linked and not state.up:
        yield from _destination_breaks(state)


def _destination_breaks(state: State) -> Iterator[tuple[str, State]]:
    step = state.destination.step
    if step == WAITS:
        yield "the link is gone", _destination(state, step=FAILED)
    elif step == RUNS and state.postcopy:
        yield "the link is gone", _destination(state, step=PAUSED)
    elif step == WHOLE:
        yield "the link is gone", _destination(state, step=COMPLETED)


def _destination_ends(state: State) -> Iterator[tuple[str, State]]:
    message, rest = state.up[:1], replace(state, up=state.up[1:])
    if message == ("all-sent",) and state.destination.step == RUNS:
        # First nothing is missing any more, then it is said.
        yield "whole", _destination(_say(rest, "nothing missing"), step=WHOLE, whole=True)
    elif message == ("last word",) and state.destination.step == WHOLE:
        yield "arrive", _destination(_say(rest, "arrived"), step=COMPLETED)


def _destination_hears(state: State) -> Iterator[tuple[str, State]]:
    if not state.up:
        return
    message, rest = state.up[0], replace(state, up=state.up[1:])
    if message == "rest":
        yield "rest", _say(rest, "taken")
        yield "refuse", _destination(_say(rest, "refused"), step=FAILED)
    elif message in {"package", "end"}:
        yield message, _destination(rest, step=LOADED)
        yield "refuse", _destination(_say(rest, "refused"), step=FAILED)


def _say(state: State, message: str) -> State:
    return replace(state, down=(*state.down, message)) if state.linked else state


# --- what breaks


def _harm(state: State) -> Iterator[tuple[str, State]]:
    if state.linked and state.breaks:
        # What was under way may still arrive, all or in part; nothing new is sent.
        broken = replace(state, linked=False, breaks=state.breaks - 1)
        for up in range(len(state.up) + 1):
            for down in range(len(state.down) + 1):
                yield "break", replace(broken, up=state.up[:up], down=state.down[:down])
    if not state.deaths:
        return
    fewer = replace(state, deaths=state.deaths - 1, linked=False)
    if state.source.engine and state.source.step not in {COMPLETED, FAILED, PAUSED}:
        yield "the source's engine dies", _source_dies(replace(fewer, down=()))
    if state.destination.engine and state.destination.step not in {COMPLETED, FAILED, PAUSED}:
        yield "the destination's engine dies", _destination_dies(replace(fewer, up=()))


def _source_dies(state: State) -> State:
    """What its guest's process makes of it; another engine is started by the recovery."""
    if not state.source.gave_up:
        return _back(state)
    return _source_breaks(state)


def _destination_dies(state: State) -> State:
    destination = state.destination
    if destination.whole:
        return _destination(state, step=COMPLETED)
    if destination.owns and state.postcopy:
        # Its devices are loaded: the guest's process runs it, if the engine had not come to that.
        return _destination(state, step=PAUSED, runs=True)
    if destination.owns:
        return _destination(state, step=COMPLETED)
    return _destination(state, step=FAILED)


def _recovered(state: State) -> State:
    """Both are connected anew; the destination answers with what it has."""
    again = replace(state, linked=True, up=(), down=("bitmap",))
    return _destination(_source(again, step=RECOVERS), step=RUNS)


def _source(state: State, **changes: object) -> State:
    return replace(state, source=replace(state.source, **changes))


def _destination(state: State, **changes: object) -> State:
    return replace(state, destination=replace(state.destination, **changes))
