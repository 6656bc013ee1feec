"""The meaning of each status of a migration: one table for each side, and one for restores.

Every status has a row on either side.  ``{source}`` and ``{destination}`` stand for QMP addresses; the
caller formats them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from postcopy.status import Status

HERE: Final = "here"
THERE: Final = "at the other side"
NEITHER: Final = "at neither side until it is recovered or taken back"


@dataclass(frozen=True, slots=True)
class StatusHelp:
    """The meaning of a status at one side of a migration.

    :ivar meaning: what is going on.
    :ivar owner: the side that may run the guest, seen from this side.
    :ivar waits_for: what has to happen next; may be empty.
    :ivar next: the command to type next; may be empty.
    """

    meaning: str
    owner: str
    waits_for: str = ""
    next: str = ""


S = Status
_RECOVER: Final = "postcopy recover --from {source} --to {destination}"
_STATUS: Final = "postcopy status --from {source} --to {destination}"
_NEVER: Final = StatusHelp("a status that postcopy never enters", HERE, "", _STATUS)

SOURCE: Final[dict[Status, StatusHelp]] = {
    S.NONE: StatusHelp(
        "no migration has begun", HERE, "", "postcopy migrate --from {source} --to {destination} URI"
    ),
    S.SETUP: StatusHelp(
        "it is connecting to the destination; before that, a guest that is being restored is completed",
        HERE, "the destination to answer",
    ),
    S.WAIT_UNPLUG: _NEVER,
    S.ACTIVE: StatusHelp(
        "precopy: memory is sent while the guest runs", HERE,
        "little enough memory to be left, or a switch to postcopy",
    ),
    S.PRE_SWITCHOVER: StatusHelp(
        "the guest is stopped before the switchover", HERE,
        "the command to continue",
        "migrate_continue pre-switchover   (at the source's monitor)",
    ),
    S.DEVICE: StatusHelp(
        "switchover: the guest is stopped and its devices are sent", HERE, "the destination to take over"
    ),
    S.POSTCOPY_DEVICE: StatusHelp(
        "switchover: the guest is stopped, and the destination loads its devices", THERE,
        "the destination to say that it runs the guest, or that it cannot",
    ),
    S.POSTCOPY_ACTIVE: StatusHelp(
        "postcopy: the guest runs at the destination, its last pages follow", THERE,
        "the last page to be sent",
    ),
    S.POSTCOPY_PAUSED: StatusHelp(
        "postcopy is broken: this side keeps every page that the destination lacks", THERE,
        "a recovery; this process must not end", _RECOVER,
    ),
    S.POSTCOPY_RECOVER_SETUP: StatusHelp(
        "recovery: it is connecting to the destination again", THERE, "the destination to answer"
    ),
    S.POSTCOPY_RECOVER: StatusHelp(
        "recovery: both sides agree on which pages are missing", THERE,
        "the destination to tell which pages it has",
    ),
    S.COMPLETED: StatusHelp(
        "the guest has moved away", THERE, "", "quit   (at the source's monitor: nothing needs it)"
    ),
    S.CANCELLING: StatusHelp("the migration is being cancelled", HERE, "the connection to end"),
    S.CANCELLED: StatusHelp(
        "the migration was cancelled; the guest is where it was", HERE, "",
        "postcopy migrate --from {source} --to {destination} URI",
    ),
    S.FAILING: StatusHelp("the migration has failed, and ends", HERE, "the connection to end"),
    S.FAILED: StatusHelp(
        "the migration failed; the guest is where it was", HERE, "",
        "postcopy migrate --from {source} --to {destination} URI",
    ),
    S.COLO: _NEVER,
}  # fmt: skip
"""What a status means at the side that has the guest at first."""

DESTINATION: Final[dict[Status, StatusHelp]] = {
    S.NONE: StatusHelp(
        "no guest is expected yet", THERE, "the command to listen",
        "postcopy migrate --from {source} --to {destination} URI",
    ),
    S.SETUP: StatusHelp(
        "it listens for a guest", THERE, "the source to connect",
        "postcopy migrate --from {source} --to {destination} URI",
    ),
    S.WAIT_UNPLUG: _NEVER,
    S.ACTIVE: StatusHelp("a guest's memory is arriving", THERE, "the source to switch over"),
    S.PRE_SWITCHOVER: _NEVER,
    S.DEVICE: StatusHelp("the guest's devices are arriving", THERE, "the devices to be loaded"),
    S.POSTCOPY_DEVICE: StatusHelp(
        "switchover: the guest's devices are being loaded", THERE, "the devices to be loaded"
    ),
    S.POSTCOPY_ACTIVE: StatusHelp(
        "postcopy: the guest runs here, its last pages are arriving", HERE, "the last page"
    ),
    S.POSTCOPY_PAUSED: StatusHelp(
        "postcopy is broken: the guest runs here, and waits where it touches a missing page",
        HERE, "a recovery; neither process must end", _RECOVER,
    ),
    S.POSTCOPY_RECOVER_SETUP: StatusHelp("recovery: it is being prepared", HERE, "the source to connect"),
    S.POSTCOPY_RECOVER: StatusHelp(
        "recovery: both sides agree on which pages are missing", HERE, "the source to go on"
    ),
    S.COMPLETED: StatusHelp("the guest has arrived, whole", HERE),
    S.CANCELLING: _NEVER,
    S.CANCELLED: StatusHelp(
        "the migration was cancelled at its source", THERE, "",
        "postcopy migrate --from {source} --to {destination} URI",
    ),
    S.FAILING: StatusHelp("the migration has failed, and ends", THERE, "the connection to end"),
    S.FAILED: StatusHelp(
        "no guest arrived, or some of its pages are lost", THERE, "",
        "quit   (at the destination's monitor, and start it again)",
    ),
    S.COLO: _NEVER,
}  # fmt: skip
"""What a status means at the side that the guest goes to."""

RESTORE: Final[dict[Status, StatusHelp]] = {
    S.ACTIVE: StatusHelp("restore: the guest's memory is read from its image", HERE, "the last page"),
    S.POSTCOPY_ACTIVE: StatusHelp(
        "restore: the guest runs here, the rest of its memory follows from the image", HERE,
        "the last page",
    ),
    S.POSTCOPY_PAUSED: StatusHelp(
        "the restore is paused: the guest runs here, and waits where it touches a missing page",
        HERE, "its image; this process must not end",
        "migrate_recover file:PATH   (at its monitor; PATH is where the image is now)",
    ),
    S.POSTCOPY_RECOVER: StatusHelp("the restore goes on", HERE, "the image to be opened"),
}  # fmt: skip
"""The meaning of a status of a restore; all others have their usual meaning."""

LOST: Final = StatusHelp(
    "the guest runs here without the pages that were lost with its source; an access to one fails",
    HERE, "", "save what you can from inside the guest, and start it again",
)  # fmt: skip
"""A destination that has failed and yet runs the guest: ``x-migrate-lost``."""

UNCERTAIN: Final = StatusHelp(
    "the link broke during the switchover: the guest is stopped here, and the destination may be running "
    "it", NEITHER, "a check of the destination",
    "cont   (at the source's monitor, only if the destination does not run the guest)",
)  # fmt: skip
"""A source that has failed and may not run the guest."""

UNREACHABLE: Final = StatusHelp(
    "it cannot be reached, so its state is unknown", "there, if it is not at the other side",
    "a check whether its process has ended",
)  # fmt: skip
"""A side whose monitor cannot be reached."""

UNKNOWN: Final = StatusHelp(
    "a status that this client does not know: the machine is newer", "at the side whose machine is running",
    "the next status", _STATUS,
)  # fmt: skip
"""Any side in a status of which this table has no row."""


def status_help(
    status: Status | str, run_state: str, *, incoming: bool, restoring: bool = False
) -> StatusHelp:
    """Return the row for one side.

    :param status: a ``str`` for a status that this client does not know: :data:`UNKNOWN`.
    :param run_state: of its machine, from ``query-status``.
    :param restoring: see :func:`is_restoring`.
    """
    if not isinstance(status, Status):
        return UNKNOWN
    if restoring and status in RESTORE:
        return RESTORE[status]
    if status is Status.FAILED:
        if incoming and run_state != "inmigrate":
            return LOST
        if not incoming and run_state in {"finish-migrate", "postmigrate"}:
            return UNCERTAIN
    return (DESTINATION if incoming else SOURCE)[status]


def is_restoring(info: Mapping[str, Any]) -> bool:
    """Whether a restore is under way, and no migration, by the answer to ``query-migrate``."""
    measured = info.get("x-postcopy", {})
    return "demand-faults" in measured and "restore-complete-us" not in measured


def how_to_recover(source: str, destination: str | None, options: str = "") -> str:
    """Return the command that recovers a broken postcopy between these QMP addresses.

    :param options: further ones, as typed; empty, or with a space in front.
    """
    return _RECOVER.format(source=source, destination=destination or "QMP-ADDRESS") + options
