"""Where a migration stands, and where it may go from there.

Everything that changes the status is in this file, and nothing in it knows which side it is on:
source and destination walk the same table.  ``docs/status.md`` is drawn from the table by
``python -m postcopy.status``, and a test compares the two.

The names are QEMU's ``MigrationStatus`` (``qapi/migration.json``).
"""

import enum
import threading
from collections.abc import Callable

from postcopy.errors import WrongState


class Status(enum.Enum):
    """QEMU 11.1's statuses; ``failing``, ``colo`` and ``wait-unplug`` are listed but never entered here.

    A source of QEMU 11.1 says ``failing`` before each ``failed``, while it cleans up; one of 10.0 does not.
    Ours says ``failed`` when that is done and the guest runs again: before that there is nothing to do.
    """

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILING = "failing"
    FAILED = "failed"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"


S = Status
MOVES: dict[Status, frozenset[Status]] = {
    S.NONE: frozenset({S.SETUP}),
    S.SETUP: frozenset({S.ACTIVE, S.CANCELLING, S.FAILED}),
    S.ACTIVE: frozenset(
        # A destination has no device status, and a restore loads its devices while it is active.
        {
            S.PRE_SWITCHOVER,
            S.DEVICE,
            S.POSTCOPY_DEVICE,
            S.POSTCOPY_ACTIVE,
            S.COMPLETED,
            S.CANCELLING,
            S.FAILED,
        }
    ),
    S.PRE_SWITCHOVER: frozenset({S.DEVICE, S.CANCELLING, S.FAILED}),
    S.DEVICE: frozenset({S.COMPLETED, S.POSTCOPY_DEVICE, S.CANCELLING, S.FAILED}),
    S.CANCELLING: frozenset({S.CANCELLED, S.FAILED}),
    # The source has given the guest up, and the destination loads its devices.  It may still refuse
    # them: then each side fails, and the guest runs on at the source.  A source that hears nothing
    # cannot know, and pauses.
    S.POSTCOPY_DEVICE: frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.FAILED}),
    # From here each side holds pages that the other lacks, so there is no way back.  A broken
    # channel only pauses, for as long as it takes; FAILED means that the guest is lost or, at the
    # source, that the destination has left without ever running it.
    S.POSTCOPY_ACTIVE: frozenset({S.COMPLETED, S.POSTCOPY_PAUSED, S.FAILED}),
    S.POSTCOPY_PAUSED: frozenset(
        # Completed: a source whose destination has everything, and could not tell it.
        {S.POSTCOPY_RECOVER_SETUP, S.POSTCOPY_RECOVER, S.COMPLETED, S.FAILED}
    ),
    S.POSTCOPY_RECOVER_SETUP: frozenset({S.POSTCOPY_RECOVER, S.POSTCOPY_PAUSED}),
    S.POSTCOPY_RECOVER: frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED}),
    S.COMPLETED: frozenset({S.SETUP}),
    S.CANCELLED: frozenset({S.SETUP}),
    S.FAILED: frozenset({S.SETUP}),
    S.FAILING: frozenset(),
    S.COLO: frozenset(),
    S.WAIT_UNPLUG: frozenset(),
}

ENDED = frozenset({S.NONE, S.COMPLETED, S.CANCELLED, S.FAILED})
"""No migration is in progress: a new one may start."""

AFTER_SWITCHOVER = frozenset(
    {S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.POSTCOPY_RECOVER_SETUP, S.POSTCOPY_RECOVER}
)
"""The destination owns the guest, and neither side may drop anything."""

GIVEN_UP = AFTER_SWITCHOVER | {S.POSTCOPY_DEVICE}
"""A source that sends by postcopy has given the guest up; its destination need not own it yet."""


class StatusMachine:
    """The one status of one side of a migration, shared by its threads.

    Invariant, kept under one lock: the status only ever changes along :data:`MOVES`.
    """

    def __init__(
        self, on_change: Callable[[Status], None] = lambda _: None, begin: Status = Status.NONE
    ) -> None:
        self._status = begin
        self._changed = threading.Condition()
        self._on_change = on_change

    @property
    def status(self) -> Status:
        """The status now; another thread may have moved on when you look at it."""
        return self._status

    def move(self, to: Status, *, only_from: frozenset[Status] | None = None) -> bool:
        """Go to ``to``, tell the listener, and wake the threads that wait for it.

        :param only_from: do nothing unless the status is one of these (a compare-and-swap, for
            moves that race with a user's cancel).
        :return: whether the status was changed.
        :raises WrongState: the table has no such move; the status stays.
        """
        with self._changed:
            if only_from is not None and self._status not in only_from:
                return False
            if to not in MOVES[self._status]:
                raise WrongState(f"cannot go from {self._status.value} to {to.value}")
            self._status = to
            # The listener is called under the lock, so that events keep the order of the moves.
            self._on_change(to)
            self._changed.notify_all()
        return True

    def wait(self, *wanted: Status, timeout: float | None = None) -> Status:
        """Sleep until the status is one of ``wanted``, and say which.

        :raises TimeoutError: it did not come within ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._status in wanted, timeout):
                raise TimeoutError(f"still {self._status.value} after {timeout} s")
            return self._status


def table() -> str:
    """The table for a page of the manual; a status that is never entered is left out."""
    lines = ["| from | to |", "| --- | --- |"]
    for origin, targets in MOVES.items():
        if targets:
            to = ", ".join(f"`{status.value}`" for status in Status if status in targets)
            lines.append(f"| `{origin.value}` | {to} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
