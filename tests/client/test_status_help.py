"""Each status of each side has its sentences, and what to type can be typed."""

import pytest

from postcopy.cli.status import as_object, lines, side_of, what_next
from postcopy.client.explain import explain
from postcopy.client.status_help import DESTINATION, LOST, SOURCE, UNCERTAIN, status_help
from postcopy.ownership import Owner
from postcopy.status import Status

TABLES = pytest.mark.parametrize("table", [SOURCE, DESTINATION], ids=["source", "destination"])


@TABLES
@pytest.mark.parametrize("status", Status)
def test_each_status_is_told(table, status):
    row = table[status]
    assert row.meaning
    assert row.owner
    for text in (row.meaning, row.owner, row.waits_for):
        assert "\n" not in text
        assert "{" not in text
    assert row.waits_for or row.next or status is Status.COMPLETED
    typed = row.next.format(source="unix:/a", destination="unix:/b")
    assert typed.split()[:1] in (
        [], ["postcopy"], ["quit"], ["cont"], ["migrate_continue"],
    )  # fmt: skip


def test_a_paused_side_says_how_to_recover():
    for table in (SOURCE, DESTINATION):
        assert table[Status.POSTCOPY_PAUSED].next.startswith("postcopy recover --from")


@pytest.mark.parametrize(
    ("status", "run_state", "incoming", "row"),
    [
        (Status.FAILED, "running", False, SOURCE[Status.FAILED]),
        (Status.FAILED, "finish-migrate", False, UNCERTAIN),
        (Status.FAILED, "inmigrate", True, DESTINATION[Status.FAILED]),
        (Status.FAILED, "internal-error", True, LOST),
        (Status.COMPLETED, "running", True, DESTINATION[Status.COMPLETED]),
    ],
)
def test_what_has_failed_depends_on_who_has_the_guest(status, run_state, incoming, row):
    assert status_help(status, run_state, incoming=incoming) is row


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_guest_that_wakes_is_no_side_of_a_migration(side):
    restore = {"demand-faults": 3, "restore-running-us": 80000}
    waking = {"status": "postcopy-active", "x-postcopy": restore, "ram": {"remaining": 3 << 20}}
    told = side_of(side, "unix:/a", waking, {"status": "running"})
    assert "the rest of its memory follows from the image" in told.standing.meaning
    assert told.standing.owner == "here"
    paused = side_of(side, "unix:/a", waking | {"status": "postcopy-paused"}, {"status": "running"})
    assert what_next([paused], "unix:/a", None).startswith("migrate_recover file:PATH ")
    # A migration that has waited for it shows its times, too, and is a migration all the same.
    moving = waking | {"x-postcopy": restore | {"restore-complete-us": 90000}}
    assert side_of(side, "unix:/a", moving, {"status": "running"}).standing is not told.standing


def test_two_sides_in_words():
    info = {"status": "postcopy-paused", "error-desc": "broken", "ram": {"remaining": 3 << 20}}
    ours = side_of("source", "unix:/a", info, {"status": "finish-migrate"})
    theirs = side_of("destination", "unix:/b", {"status": "postcopy-paused"}, {"status": "running"})
    text = "\n".join(lines(ours))
    assert "postcopy-paused; the machine is finish-migrate, 3.0 MiB remaining" in text
    assert "because    broken" in text
    typed = "postcopy recover --from unix:/a --to unix:/b"
    assert what_next([ours, theirs], "unix:/a", "unix:/b") == typed
    assert what_next([theirs], None, "unix:/b").endswith("--from QMP-ADDRESS --to unix:/b")
    never = side_of("destination", "unix:/b", {"status": "failed"}, {"status": "inmigrate"})
    assert what_next([ours, never], "unix:/a", "unix:/b").startswith("cont ")
    whole = side_of("destination", "unix:/b", {"status": "completed"}, {"status": "running"})
    assert what_next([ours, whole], "unix:/a", "unix:/b").startswith("x_migrate_arrived ")
    told = as_object([ours, theirs], typed)
    assert told["source"]["standing"]["owner"] == "at the other side"
    assert told["destination"]["standing"]["owner"] == "here"
    assert told["next"] == typed


@pytest.mark.parametrize(
    ("status", "run_state", "says", "owner"),
    [
        (None, "running", "no migration has begun", "here"),
        ("completed", "running", "has ended, and the guest is here", "here"),
        ("failed", "running", "failed, and the guest is here", "here"),
        ("completed", "postmigrate", "moved away, or has been written to a file", "in the file"),
        ("setup", "inmigrate", "it listens for a guest", "at the other side"),
        ("postcopy-active", "running", "the guest runs here", "here"),
        ("postcopy-active", "finish-migrate", "runs at the destination", "at the other side"),
        ("failed", "postmigrate", "the destination may be running it", "at neither side"),
    ],
)
def test_of_a_qemu_what_its_run_state_shows(status, run_state, says, owner):
    """The same whichever side it is asked as, and it is said that the machine does not say it."""
    info = {} if status is None else {"status": status}
    for side in ("source", "destination"):
        told = side_of(side, "unix:/a", info, {"status": run_state})
        assert says in told.standing.meaning
        assert owner in told.standing.owner
        assert "does not tell the owner" in "\n".join(lines(told))


@pytest.mark.parametrize("owner", Owner)
def test_each_owner_is_told(owner):
    for status in Status:
        for order in ("migrate", "snapshot", "migrate-incoming", "restore"):
            direction = "outgoing" if order in {"migrate", "snapshot"} else "incoming"
            state = {
                "status": "running",
                "x-owner": owner.value,
                "x-last-order": {"name": order, "direction": direction, "uri": "file:/a"},
            }
            told = explain(state, {"status": status.value})
            assert told.meaning
            assert told.owner


def test_an_owner_of_a_newer_machine_is_told_as_it_is():
    told = explain({"status": "running", "x-owner": "shared"}, {})
    assert "'shared'" in told.meaning
