"""Every kind of URI with everything that can be done over it: one journey each.

Each ends with the oracle over all of the guest's memory, and with exactly one owner.  What cannot be
combined is refused before anything moves.
"""

import contextlib
import os
from pathlib import Path

import pytest

from fakes import transports
from fakes.awakening import wake, woken
from fakes.pair import NEVER_ENDS, QUICK, TRICKLE, hammer
from fakes.transports import (
    ANSWERS,
    CANCEL,
    FEATURES,
    KINDS,
    LATER,
    NEEDS,
    PAUSE,
    PLACES,
    POSTCOPY,
    PRECOPY,
    PREEMPT,
    RECOVERY,
    SNAPSHOT,
    refusal,
)
from postcopy.errors import Refused, WrongState
from postcopy.parameters import Capability, Overrides
from postcopy.status import Status


def kinds(feature):
    """Those over which it can be done."""
    found = [kind for kind in KINDS if transports.can(kind, feature)]
    return pytest.mark.parametrize("kind", found)


def small():
    return hammer(fill_kib=2048)


def begin(journey, tmp_path, kind, feature, parameters=QUICK, more=()):
    trip = journey(small(), capabilities=(*NEEDS[feature], *more), parameters=parameters)
    way = KINDS[kind](tmp_path)
    return trip, way


def stays(trip, *, called):
    """The guest has stayed, and is nowhere else."""
    trip.verify_source()
    if called:
        trip.destination.wait(Status.FAILED)
    assert not trip.destination.machine.owned
    assert not trip.destination.machine.running


@kinds(PRECOPY)
def test_precopy(journey, tmp_path, kind):
    trip, way = begin(journey, tmp_path, kind, PRECOPY)
    way.carry(trip.source, trip.destination)
    trip.finish()


@kinds(ANSWERS)
def test_return_path(journey, tmp_path, kind):
    trip, way = begin(journey, tmp_path, kind, ANSWERS)
    way.carry(trip.source, trip.destination)
    trip.finish()


@pytest.mark.parametrize(
    ("kind", "feature"),
    [(kind, feature) for feature in (POSTCOPY, PREEMPT) for kind in KINDS if transports.can(kind, feature)],
)  # fmt: skip
def test_postcopy(journey, tmp_path, kind, feature):
    trip, way = begin(journey, tmp_path, kind, feature, NEVER_ENDS)
    way.carry(trip.source, trip.destination)
    trip.source.wait_rounds(1)
    trip.source.control.start_postcopy()
    trip.finish()


@kinds(RECOVERY)
@pytest.mark.parametrize("pauses", ["source", "destination"])
def test_pause_and_recovery(journey, tmp_path, kind, pauses):
    """A pause is refused while the guest is here, and once it is paused."""
    trip, way = begin(journey, tmp_path, kind, RECOVERY, TRICKLE)
    way.carry(trip.source, trip.destination)
    trip.source.wait(Status.ACTIVE)
    pauser = getattr(trip, pauses)
    with pytest.raises(WrongState, match="only supported during postcopy-active"):
        pauser.control.pause()
    trip.source.control.start_postcopy()
    for side in (trip.source, trip.destination):
        side.wait(Status.POSTCOPY_ACTIVE)
    pauser.control.pause()
    for side in (trip.source, trip.destination):
        side.wait(Status.POSTCOPY_PAUSED)
    with pytest.raises(WrongState, match="only supported during postcopy-active"):
        pauser.control.pause()
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    way.recover(trip.source, trip.destination)
    trip.finish()


def test_a_recovery_is_refused_where_nothing_answers(journey, tmp_path):
    trip, way = begin(journey, tmp_path, "unix:PATH", RECOVERY, TRICKLE)
    way.carry(trip.source, trip.destination)
    trip.source.control.start_postcopy()
    for side in (trip.source, trip.destination):
        side.wait(Status.POSTCOPY_ACTIVE)
    trip.source.control.pause()
    for side in (trip.source, trip.destination):
        side.wait(Status.POSTCOPY_PAUSED)
    for number, kind in enumerate(transports.SILENT):
        folder = tmp_path / f"silent-{number}"
        folder.mkdir()
        refused(trip.source, KINDS[kind](folder), kind, RECOVERY, resume=True)
        assert trip.source.status is Status.POSTCOPY_PAUSED
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    way.recover(trip.source, trip.destination)
    trip.finish()


@kinds(SNAPSHOT)
def test_snapshot(journey, tmp_path, kind):
    """The guest goes on, and its twin does at the other end: of each there is exactly one."""
    trip, way = begin(journey, tmp_path, kind, PRECOPY)
    trip.destination.set(NEEDS[SNAPSHOT])  # it refuses a twin, unless it is told that one is wanted
    way.carry(trip.source, trip.destination, Overrides.for_snapshot(mapped=False))
    trip.source.wait(Status.COMPLETED)
    trip.destination.wait(Status.COMPLETED)
    trip.verify(trip.destination)
    trip.verify_source()


@pytest.mark.parametrize("kind", sorted(transports.MULTI))
def test_a_snapshot_to_another_machine_is_ordered_as_one(journey, tmp_path, kind):
    """A capability that was left on does not make a twin."""
    trip, way = begin(journey, tmp_path, kind, SNAPSHOT)
    way.listen(lambda uri: uri.replace(":0", ":1"))
    with pytest.raises(Refused, match="capability background-snapshot is on"):
        way.send(trip.source.control.migrate)
    assert trip.source.status is Status.NONE
    trip.verify_source()


@kinds(PLACES)
def test_mapped_ram(journey, tmp_path, kind):
    trip, way = begin(journey, tmp_path, kind, PLACES)
    way.carry(trip.source, trip.destination)
    trip.finish()


def saved(trip, tmp_path, kind):
    """Have the guest written to a file of its own; return the file."""
    file = tmp_path / "saved"
    migrate = trip.source.control.migrate
    if kind == "exec:COMMAND":
        migrate(f"exec:cat > {file}")
    elif kind == "fd: of a file":
        with file.open("wb") as opened:
            migrate(f"fd:{opened.fileno()}")
    else:
        migrate(f"file:{file}")
    trip.source.wait(Status.COMPLETED)
    return file


@kinds(LATER)
def test_restore(journey, tmp_path, kind):
    """What was saved is a file, and a guest can be run at once from it."""
    trip, _ = begin(journey, tmp_path, kind, LATER)
    wake(trip.destination, saved(trip, tmp_path, kind))
    woken(trip)
    assert not trip.source.machine.owned


def test_a_command_brings_what_was_saved(journey, tmp_path):
    trip, _ = begin(journey, tmp_path, "exec:COMMAND", LATER)
    trip.destination.listen(f"exec:cat {saved(trip, tmp_path, 'exec:COMMAND')}")
    trip.finish()


# --- cancel

STEPS = ("at once", "active", "pre-switchover")


@kinds(CANCEL)
@pytest.mark.parametrize("step", STEPS)
def test_cancel(journey, tmp_path, kind, step):
    # A command is told to carry answers; it would have no other way to say that all has arrived.
    more = (Capability.RETURN_PATH,) if kind == "exec:COMMAND" else ()
    parameters = QUICK
    if step == "pre-switchover":
        more = (*more, Capability.PAUSE_BEFORE_SWITCHOVER)
    else:
        parameters = NEVER_ENDS
    trip, way = begin(journey, tmp_path, kind, CANCEL, parameters, more)
    if way.live:
        way.listen(trip.destination.listen)
    way.send(trip.source.control.migrate)
    if step != "at once":
        trip.source.wait({"active": Status.ACTIVE, "pre-switchover": Status.PRE_SWITCHOVER}[step])
        if way.live:
            trip.destination.wait(Status.ACTIVE)
    trip.source.control.cancel()
    trip.source.wait(Status.CANCELLED)
    assert trip.source.error is None
    stays(trip, called=way.live and step != "at once")


@pytest.mark.parametrize("kind", KINDS)
def test_cancel_in_the_switchover(journey, tmp_path, kind):
    """It comes in time or too late, and both sides are of one opinion."""
    more = (Capability.PAUSE_BEFORE_SWITCHOVER,)
    trip, way = begin(journey, tmp_path, kind, CANCEL, more=more)
    if way.live:
        way.listen(trip.destination.listen)
    way.send(trip.source.control.migrate)
    trip.source.wait(Status.PRE_SWITCHOVER)
    trip.source.control.continue_(Status.PRE_SWITCHOVER)
    with contextlib.suppress(WrongState):  # it has been given up: too late
        trip.source.control.cancel()
    if trip.source.wait(Status.CANCELLED, Status.COMPLETED) is Status.CANCELLED:
        stays(trip, called=way.live)
        return
    if not way.live:
        way.listen(trip.destination.listen)
    trip.finish()


# --- what cannot be combined


def refused(side, way, kind, feature, *, resume=False):
    with contextlib.ExitStack() as stack:
        if isinstance(way, transports.Descriptors):
            theirs, way.ours = way.ends()
            stack.callback(os.close, theirs)
        way.where = getattr(way, "where", f"unix:{way.folder}/nobody")
        with pytest.raises(Refused) as said:
            way.send(lambda uri: side.control.migrate(uri, resume=resume))
    assert str(said.value).startswith(refusal(kind, feature))


@pytest.mark.parametrize("kind", KINDS)
def test_refused(journey, tmp_path, kind):
    trip = journey(small())
    for feature in FEATURES:
        if refusal(kind, feature) is None:
            continue
        trip.source.set(NEEDS[feature])
        refused(trip.source, KINDS[kind](tmp_path), kind, feature)
        assert trip.source.status is Status.NONE
        assert set(map(Path.read_bytes, tmp_path.iterdir())) <= {b"", b"X" * 8192}  # as they were
        trip.source.control.set_capabilities(dict.fromkeys(NEEDS[feature], False))
    trip.verify_source()
    assert trip.source.machine.owned


def test_a_pause_is_only_for_a_postcopy(journey, tmp_path):
    trip, way = begin(journey, tmp_path, "exec:COMMAND", PAUSE, NEVER_ENDS)
    way.carry(trip.source, trip.destination)
    trip.source.wait(Status.ACTIVE)
    with pytest.raises(WrongState, match="only supported during postcopy-active"):
        trip.source.control.pause()
    trip.source.control.cancel()
    trip.source.wait(Status.CANCELLED)


def test_the_manual_has_the_same_table():
    assert transports.page(transports.PAGE.read_text()) == transports.PAGE.read_text(), (
        "docs/transports.md is not current: run PYTHONPATH=tests python -m fakes.transports"
    )
