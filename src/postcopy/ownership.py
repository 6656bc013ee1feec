"""Which side may run the guest: one table of states and moves, kept in the guest's process.

An engine and a user only ask for a :class:`Move`.  The table decides, under one lock, so of two moves
that exclude each other (a user's cancel, an engine's hand-over) exactly one succeeds.  Engines may die
between any two steps: what they have moved stays.

``docs/ownership.md`` is drawn from the table.  ``tests/model/handover.py`` explores the table itself, with
every order of a user and every failure, and finds no state in which two sides may run the guest.
"""

import enum
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from postcopy.errors import Reason, WrongState
from postcopy.trace import trace


class Owner(enum.Enum):
    """Whose the guest is, as far as this process knows; the values are QMP's ``x-owner``."""

    OURS = "ours"
    MOVING = "moving"
    STOPPED = "stopped-to-move"
    GIVEN_UP = "given-up"
    UNKNOWN = "unknown"
    TAKEN = "taken"
    MOVED = "moved"
    SAVED = "saved"
    AWAITED = "awaited"
    ARRIVING = "arriving"
    ABANDONED = "abandoned"


class Move(enum.Enum):
    """What can happen to the ownership of a guest."""

    ORDER = "order"  # a user orders a migration
    STOP = "stop"  # its engine has stopped the vCPUs for the switchover
    CANCEL = "cancel"  # a user cancels
    END = "end"  # it has ended, and the guest was never handed over
    GIVE_UP = "give-up"  # its engine is about to send the last byte
    SAVE = "save"  # all has been written to where nothing answers: a file, a pipe, a command
    TAKE_BACK = "take-back"  # the destination has refused it, or never got the last byte
    LOSE_TOUCH = "lose-touch"  # the link or the engine is gone before the destination's answer
    RESUME = "resume"  # a user goes on with a paused postcopy
    TAKEN = "taken"  # the destination says that it runs the guest
    MOVED = "moved"  # the destination is known to have every page
    CONT = "cont"  # a user lets the guest run
    BEGIN = "begin"  # the machine has been started to wait for a guest
    AWAIT = "await"  # a user has it wait for a guest, perhaps for another one
    ARRIVING = "arriving"  # the devices are loaded: the source is about to be told so
    ARRIVE = "arrive"  # the guest runs here
    ABANDON = "abandon"  # no guest comes


MOVES: Final[Mapping[Move, Mapping[Owner, Owner]]] = {
    Move.ORDER: {Owner.OURS: Owner.MOVING},
    Move.STOP: {Owner.MOVING: Owner.STOPPED, Owner.STOPPED: Owner.STOPPED},
    # After a cancel no engine can give the guest up any more: the table has no GIVE_UP from OURS.
    Move.CANCEL: {
        Owner.OURS: Owner.OURS,
        Owner.MOVING: Owner.OURS,
        Owner.STOPPED: Owner.OURS,
    },
    Move.END: {Owner.MOVING: Owner.OURS, Owner.STOPPED: Owner.OURS},
    Move.GIVE_UP: {Owner.STOPPED: Owner.GIVEN_UP},
    # Only when nothing more is written: until then a reader may still start the guest, or fail to.
    Move.SAVE: {Owner.GIVEN_UP: Owner.SAVED},
    Move.TAKE_BACK: {
        Owner.OURS: Owner.OURS,
        Owner.MOVING: Owner.OURS,
        Owner.STOPPED: Owner.OURS,
        Owner.GIVEN_UP: Owner.OURS,
    },
    Move.LOSE_TOUCH: {Owner.GIVEN_UP: Owner.UNKNOWN},
    Move.RESUME: {
        Owner.UNKNOWN: Owner.GIVEN_UP,
        Owner.GIVEN_UP: Owner.GIVEN_UP,
        Owner.TAKEN: Owner.TAKEN,
    },
    Move.TAKEN: {Owner.GIVEN_UP: Owner.TAKEN, Owner.TAKEN: Owner.TAKEN},
    Move.MOVED: {
        Owner.GIVEN_UP: Owner.MOVED,
        Owner.UNKNOWN: Owner.MOVED,
        Owner.TAKEN: Owner.MOVED,
        Owner.MOVED: Owner.MOVED,
    },
    Move.CONT: {
        Owner.OURS: Owner.OURS,
        Owner.MOVING: Owner.MOVING,
        Owner.UNKNOWN: Owner.OURS,
        Owner.SAVED: Owner.OURS,
    },
    Move.BEGIN: {Owner.OURS: Owner.AWAITED},
    Move.AWAIT: {Owner.AWAITED: Owner.AWAITED, Owner.ABANDONED: Owner.AWAITED},
    Move.ARRIVING: {Owner.AWAITED: Owner.ARRIVING, Owner.OURS: Owner.OURS},
    Move.ARRIVE: {Owner.AWAITED: Owner.OURS, Owner.ARRIVING: Owner.OURS},
    Move.ABANDON: {Owner.AWAITED: Owner.ABANDONED},
}
"""A move that is not listed for the present owner is refused, and changes nothing."""

MOVES_OF_ENGINES: Final = frozenset(
    {Move.GIVE_UP, Move.SAVE, Move.TAKE_BACK, Move.MOVED, Move.ABANDON}
)
"""Those that an engine asks for; the others are a user's, or follow from what an engine does."""

RUNS: Final = frozenset({Owner.OURS, Owner.MOVING})
"""The vCPUs may run."""

HERE: Final = RUNS | {Owner.STOPPED}
"""The guest is ours: whatever fails now, it runs on here."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """An owner in words.

    :ivar text: what is so; no full stop.
    :ivar advice: what a user can do about it; empty where there is nothing to do.
    """

    text: str
    advice: str = ""


MEANINGS: Final[Mapping[Owner, Meaning]] = {
    Owner.OURS: Meaning("the guest is here"),
    Owner.MOVING: Meaning("the guest is here, and a migration of it is in progress"),
    Owner.STOPPED: Meaning("the guest is here, and is stopped for the switchover"),
    Owner.GIVEN_UP: Meaning(
        "the guest has been handed over, and it is not known yet whether it has arrived",
        "wait until the migration has ended",
    ),
    Owner.UNKNOWN: Meaning(
        "the link broke during the switchover: the destination may be running the guest",
        "look at the destination; 'cont' takes the guest back if it does not run there",
    ),
    Owner.TAKEN: Meaning(
        "the destination runs the guest, and still needs pages from here",
        "this process must not end before the migration is completed",
    ),
    Owner.MOVED: Meaning("the destination runs the guest", "'quit' ends this process; it is not needed"),
    Owner.SAVED: Meaning(
        "the guest has been written to where nothing answers (a file, a pipe, a command)",
        "'cont' runs it here, if no other machine has been started from what was written",
    ),
    Owner.AWAITED: Meaning("the guest has not arrived yet"),
    Owner.ARRIVING: Meaning("the guest has arrived, and is about to run here"),
    Owner.ABANDONED: Meaning(
        "the guest has not arrived: the incoming migration failed",
        "'migrate_incoming' waits for another",
    ),
}  # fmt: skip

_REFUSALS: Final[Mapping[tuple[Move, Owner], str]] = {
    (Move.CONT, Owner.STOPPED): "Migration is not finalized yet",
    (Move.ORDER, Owner.AWAITED): "Guest is waiting for an incoming migration",
    (Move.ORDER, Owner.ARRIVING): "Guest is waiting for an incoming migration",
    (Move.ORDER, Owner.ABANDONED): "Guest is waiting for an incoming migration",
    (Move.ORDER, Owner.MOVING): "There's a migration process in progress",
    (Move.ORDER, Owner.STOPPED): "There's a migration process in progress",
    (Move.RESUME, Owner.OURS): "Cannot resume: 'cont' has taken the guest back, and it is here",
}
_VERBS: Final[Mapping[Move, str]] = {
    Move.ORDER: "the guest cannot be migrated",
    Move.CANCEL: "the migration cannot be cancelled",
    Move.CONT: "the guest must not run here",
    Move.ARRIVE: "the guest must not run here",
    Move.RESUME: "the migration cannot be resumed",
}


def refusal(move: Move, owner: Owner) -> str:
    """Say in one line why a move is not possible, in QEMU's words where it has any."""
    known = _REFUSALS.get((move, owner))
    if known is not None:
        return known
    meaning = MEANINGS[owner]
    what = _VERBS.get(move, f"'{move.value}' is not possible")
    return f"{what}: {meaning.text}" + (f"; {meaning.advice}" if meaning.advice else "")


def _refused(move: Move, owner: Owner) -> WrongState:
    busy = move is Move.ORDER and owner in {Owner.MOVING, Owner.STOPPED}
    return WrongState(refusal(move, owner), Reason.BUSY if busy else Reason.OWNER)


@dataclass(frozen=True, slots=True)
class LastOrder:
    """What was ordered last of this guest.

    :ivar name: ``migrate``, ``snapshot``, ``migrate-incoming``, ``restore``, ``migrate-recover``...
    :ivar direction: ``outgoing`` or ``incoming``.
    :ivar uri: where to, or where from.
    """

    name: str
    direction: str
    uri: str


class Ownership:
    """Whose the guest of this process is.

    Invariant, under one lock: the owner changes only along :data:`MOVES`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = Owner.OURS
        self._arrival = 0
        self._last_order: LastOrder | None = None

    @property
    def owner(self) -> Owner:
        """The owner now; another thread may have moved on when the caller looks at it."""
        return self._owner

    @property
    def here(self) -> bool:
        """Whether the guest is ours, running or not."""
        return self._owner in HERE

    @property
    def may_run(self) -> bool:
        """Whether the vCPUs may run now."""
        return self._owner in RUNS

    @property
    def arrival(self) -> int:
        """The number of the guest that is awaited: it tells a late answer from one that counts."""
        return self._arrival

    @property
    def last_order(self) -> LastOrder | None:
        """What was ordered last; None before the first order."""
        return self._last_order

    def ordered(self, name: str, direction: str, uri: str = "") -> None:
        """Note an order of the user that has been accepted."""
        self._last_order = LastOrder(name, direction, uri)
        trace("guest.order", name=name, direction=direction, uri=uri)

    def move(self, move: Move, *, arrival: int | None = None) -> Owner:
        """Make a move.

        :param arrival: refuse the move if another guest is awaited by now.
        :return: the owner before it.
        :raises WrongState: the table has no such move from here; nothing has changed.
        """
        with self._lock:
            before = self._owner
            to = MOVES[move].get(before)
            if to is None:
                raise _refused(move, before)
            if arrival is not None and arrival != self._arrival:
                raise WrongState("the guest must not run here: this arrival of it was given up")
            if to is Owner.AWAITED is not before:
                self._arrival += 1
            self._owner = to
        if to is not before:
            trace("guest.owner", move=move.value, before=before.value, owner=to.value)
        return before

    def try_move(self, move: Move) -> bool:
        """Make a move if the table has it from here; return whether it was made."""
        try:
            self.move(move)
        except WrongState:
            return False
        return True

    def check(self, move: Move) -> None:
        """Refuse what :meth:`move` would refuse, and change nothing.

        :raises WrongState: the table has no such move from here.
        """
        owner = self._owner
        if owner not in MOVES[move]:
            raise _refused(move, owner)

    def to_qapi(self) -> dict[str, Any]:
        """What ``query-status`` says of it, besides QEMU's members."""
        owner, order = self._owner, self._last_order
        found: dict[str, Any] = {"x-owner": owner.value}
        if order is not None:
            found["x-last-order"] = {
                "name": order.name, "direction": order.direction, "uri": order.uri
            }  # fmt: skip
        return found


def table() -> str:
    """The table for a page of the manual; moves that change nothing are left out."""
    lines = ["| from | to | by |", "| --- | --- | --- |"]
    for origin in Owner:
        for to in Owner:
            names = [
                move.value for move in Move if MOVES[move].get(origin) is to and origin is not to
            ]
            if names:
                lines.append(f"| `{origin.value}` | `{to.value}` | {', '.join(names)} |")
    return "\n".join(lines)
