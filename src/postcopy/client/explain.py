"""Explains the state of a machine: the owner of its guest, and its last order.

A machine of ours has both in its answer (``x-owner`` and ``x-last-order`` of ``query-status``).  A QEMU has
only its run state and the status of its last migration, of either direction, so some answers are not
certain; the text says so.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from postcopy.client.progress import status_of
from postcopy.client.status_help import (
    HERE,
    LOST,
    NEITHER,
    THERE,
    UNCERTAIN,
    StatusHelp,
    is_restoring,
    status_help,
)
from postcopy.ownership import MEANINGS, Owner
from postcopy.status import Status

S = Status
_MIGRATE: Final = "postcopy migrate --from {source} --to {destination} URI"
_NOT_HERE: Final = "not here"

OWNERS: Final[Mapping[Owner, str]] = {
    Owner.OURS: HERE,
    Owner.MOVING: HERE,
    Owner.STOPPED: "here, stopped for the switchover",
    Owner.GIVEN_UP: "handed over; it is not known yet whether it has arrived",
    Owner.UNKNOWN: NEITHER,
    Owner.TAKEN: THERE,
    Owner.MOVED: THERE,
    Owner.SAVED: "where it has been written to, and stopped here",
    Owner.AWAITED: _NOT_HERE,
    Owner.ARRIVING: "about to run here",
    Owner.ABANDONED: _NOT_HERE,
}
"""Texts that follow "the guest is"."""

SNAPSHOT: Final[Mapping[Status, StatusHelp]] = {
    S.SETUP: StatusHelp("a snapshot is being set up", HERE, "its file to be opened"),
    S.ACTIVE: StatusHelp(
        "a snapshot is being written, and the guest runs on", HERE, "the last page"
    ),
    S.CANCELLING: StatusHelp("the snapshot is being cancelled", HERE, "its end"),
    S.COMPLETED: StatusHelp("a snapshot has been taken, and the guest runs on", HERE),
    S.CANCELLED: StatusHelp("the snapshot was cancelled, and the guest runs on", HERE),
    S.FAILED: StatusHelp("the snapshot failed, and the guest runs on", HERE),
}
"""The meaning of a status of a background snapshot, which a machine of ours distinguishes."""

SAVED: Final = StatusHelp(
    MEANINGS[Owner.SAVED].text, OWNERS[Owner.SAVED], "",
    "cont   (at its monitor, if no other machine has been started from what was written)",
)  # fmt: skip
RESTORED: Final = StatusHelp("the guest has been restored, whole", HERE)
ARRIVED: Final = StatusHelp("the guest has arrived, whole", HERE)
TAKEN_BACK: Final = StatusHelp(
    "the migration is over, and 'cont' has taken the guest back", HERE, "", _MIGRATE
)
NOTHING: Final = StatusHelp("nothing has been ordered of the guest", HERE, "", _MIGRATE)
FAILED_HERE: Final = StatusHelp(
    "the last migration failed, and the guest is here", HERE, "", _MIGRATE
)
ENDED_HERE: Final = StatusHelp(
    "the last migration, or snapshot, has ended, and the guest is here (a QEMU does not tell which it was)",
    HERE,
)
LEFT: Final = StatusHelp(
    "the guest has moved away, or has been written to a file (a QEMU does not tell which)",
    "at the other side, or in the file", "",
    "quit   (at its monitor), or 'cont' if nothing has been started from what was written",
)  # fmt: skip
_QEMU_AWAY: Final = frozenset({"postmigrate", "finish-migrate", "colo"})


def explain(state: Mapping[str, Any], info: Mapping[str, Any]) -> StatusHelp:
    """Explain the state of one machine.

    :param state: the machine's answer to ``query-status``.
    :param info: its answer to ``query-migrate``.
    """
    told = state.get("x-owner")
    if told is None:
        return _of_a_qemu(status_of(info), str(state["status"]), info)
    try:
        owner = Owner(told)
    except ValueError:
        return StatusHelp(
            f"'{told}', an owner that this client does not know", "where its machine says"
        )
    return _of_ours(owner, state, info)


def last_order(state: Mapping[str, Any]) -> str | None:
    """Return the last order in one line; None if there is none, or the machine is a QEMU."""
    order = state.get("x-last-order")
    if order is None:
        return None
    return " ".join(filter(None, (order["name"], f"({order['direction']})", order.get("uri"))))


def _of_ours(owner: Owner, state: Mapping[str, Any], info: Mapping[str, Any]) -> StatusHelp:
    order = state.get("x-last-order") or {"name": "", "direction": ""}
    status = status_of(info)
    if owner is Owner.SAVED:
        return SAVED
    if owner is Owner.UNKNOWN and status is not S.POSTCOPY_PAUSED:
        return UNCERTAIN
    awaits = owner in {Owner.AWAITED, Owner.ARRIVING, Owner.ABANDONED}
    incoming = awaits or order["direction"] == "incoming"
    row = _row(owner, order["name"], status, str(state["status"]), info, incoming=incoming)
    return replace(row, owner=OWNERS[owner])


def _row(
    owner: Owner,
    order: str,
    status: Status | str,
    run_state: str,
    info: Mapping[str, Any],
    *,
    incoming: bool,
) -> StatusHelp:
    here = owner is Owner.OURS
    if not order and here:
        return NOTHING
    if order == "snapshot" and status in SNAPSHOT:
        return SNAPSHOT[S(status)]
    if here and status is S.FAILED:
        return LOST if incoming else FAILED_HERE
    if here and status is S.COMPLETED:
        arrived = RESTORED if order == "restore" else ARRIVED
        return arrived if incoming else TAKEN_BACK
    if here and not incoming and status is S.POSTCOPY_PAUSED:
        return TAKEN_BACK
    return status_help(status, run_state, incoming=incoming, restoring=is_restoring(info))


def _of_a_qemu(status: Status | str, run_state: str, info: Mapping[str, Any]) -> StatusHelp:
    if run_state == "inmigrate":
        return status_help(status, run_state, incoming=True)
    if run_state in _QEMU_AWAY:
        return LEFT if status is S.COMPLETED else status_help(status, run_state, incoming=False)
    if status is S.FAILED:
        return FAILED_HERE
    if status is S.COMPLETED:
        return ENDED_HERE
    # The guest may run here, so of a postcopy under way this is the destination.
    postcopy = isinstance(status, Status) and status.value.startswith("postcopy-")
    return status_help(status, run_state, incoming=postcopy, restoring=is_restoring(info))
