"""An engine dies at each step of the hand-over and of a recovery: one owner, and nothing is lost.

The steps are those of :mod:`postcopy.trace`; ``tests/model/handover.py`` says for all of them, in
any order, what is checked here with real engines one by one.
"""

import pytest

from fakes.pair import POSTCOPY as POSTCOPY_ON
from fakes.pair import QUICK
from fakes.waiting import wait_until
from faults.recovering import DEADLINE_S, Recovering, broken_journey
from postcopy import trace
from postcopy.errors import PostcopyError
from postcopy.link.guest.incoming import IncomingJob
from postcopy.ownership import Owner
from postcopy.parameters import Capability
from postcopy.status import Status

SOURCE = "runs at the source, by itself"
HELD = "stands at the source, until a user says 'cont'"
DESTINATION = "runs at the destination"

PRECOPY = {
    "source.connected": SOURCE,
    "source.active": SOURCE,
    "source.guest-stopped": SOURCE,
    "source.rest-sent": SOURCE,
    "source.all-taken": SOURCE,
    "source.given-up": HELD,
    "source.end-sent": DESTINATION,
    "destination.connected": SOURCE,
    "destination.all-received": HELD,
    "destination.devices-loaded": HELD,
    "destination.resumed": DESTINATION,
    "destination.shut-sent": DESTINATION,
}
POSTCOPY = {
    "source.guest-stopped": SOURCE,
    "source.discards-sent": SOURCE,
    "source.before-package": HELD,
    "source.package-sent": DESTINATION,
    "source.package-taken": DESTINATION,
    "source.pushing": DESTINATION,
    "source.all-pushed": DESTINATION,
    "source.pages-ended": DESTINATION,
    "source.arrived": DESTINATION,
    "destination.advised": SOURCE,
    "destination.package-received": HELD,
    "destination.listening": HELD,
    "destination.package-loaded": HELD,
    "destination.owning": DESTINATION,
    "destination.package-taken": DESTINATION,
    "destination.running": DESTINATION,
    "destination.nothing-missing": DESTINATION,
    "destination.pages-ended": DESTINATION,
    "destination.unwatched": DESTINATION,
    "destination.postcopy-shut-sent": DESTINATION,
}
RECOVERY = (*trace.SOURCE_RECOVERY, *trace.DESTINATION_RECOVERY)
TOLD = ("source.all-pushed", "source.pages-ended", "source.arrived", "destination.nothing-missing",
        "destination.pages-ended", "destination.unwatched", "destination.postcopy-shut-sent")  # fmt: skip
"""At the very end: nothing is waited for that a slow push would hold up."""
WITH_TWO_CHANNELS = ("source.before-package", "source.package-sent", "source.pushing", "source.all-pushed",
                     "destination.package-received", "destination.listening", "destination.owning",
                     "destination.nothing-missing")  # fmt: skip
BOTH_KNOW = tuple(point for point in TOLD if point != "destination.nothing-missing")
"""The source has heard that the destination needs nothing: whatever dies then, both are done."""


def test_every_point_is_tried():
    named = {
        point
        for name, points in vars(trace).items()
        if name.startswith(("SOURCE", "DESTINATION"))
        for point in points
    }
    assert named == {*PRECOPY, *POSTCOPY, *RECOVERY}


def check_owner(broken, owner):
    """Nobody but the owner runs the guest, which loses nothing."""
    if owner == SOURCE and broken.source.status is Status.POSTCOPY_PAUSED:
        # The package had left before the end of the destination was noticed: only its user knows.
        assert broken.destination.status is Status.FAILED, broken.story()
        check_held(broken)
        return
    if owner == SOURCE:
        assert broken.source.status is Status.FAILED, broken.story()
        assert broken.source.error
        broken.verify(broken.source)
        return
    if owner == HELD:
        check_held(broken)
        return
    known = broken.source.machine.ownership.owner is Owner.TAKEN
    if broken.destination.status is Status.FAILED and not known:
        check_held(broken)  # TCP's reset has overtaken the last bytes of the one that died
        return
    broken.hurry()
    if broken.destination.status is not Status.COMPLETED:
        broken.recover()
    broken.verify(broken.destination)


def check_held(broken):
    for side in (broken.source, broken.destination):
        assert not side.machine.running, broken.story()
        assert not side.machine.owned
    assert broken.destination.status is Status.FAILED, broken.story()
    broken.source.machine.cont()
    broken.verify(broken.source)


@pytest.mark.parametrize(("point", "owner"), PRECOPY.items(), ids=PRECOPY)
def test_precopy(journey, tmp_path, kill_at, point, owner):
    waits = kill_at(point)
    with Recovering(broken_journey(journey, parameters=QUICK), tmp_path) as broken:
        broken.source.control.migrate(broken.destination.listen())
        wait_until(lambda: not waits(), DEADLINE_S, f"nobody came to {point}")
        broken.until_settled()
        check_owner(broken, owner)


@pytest.mark.parametrize(("point", "owner"), POSTCOPY.items(), ids=POSTCOPY)
def test_postcopy(journey, tmp_path, kill_at, point, owner):
    waits = kill_at(point)  # before any engine is started
    die_in_postcopy(broken_journey(journey), tmp_path, waits, point, owner)


@pytest.mark.parametrize("point", WITH_TWO_CHANNELS)
def test_postcopy_with_preempt(journey, tmp_path, kill_at, point):
    waits = kill_at(point)
    trip = broken_journey(journey, capabilities=(*POSTCOPY_ON, Capability.POSTCOPY_PREEMPT))
    die_in_postcopy(trip, tmp_path, waits, point, POSTCOPY[point])


def die_in_postcopy(trip, tmp_path, waits, point, owner):
    with Recovering(trip, tmp_path) as broken:
        broken.source.control.migrate(broken.destination.listen())
        broken.switch()
        if point in TOLD:
            broken.source.wait(Status.POSTCOPY_ACTIVE)
            broken.hurry()
        wait_until(lambda: not waits(), DEADLINE_S, f"nobody came to {point}")
        broken.until_settled()
        if point in BOTH_KNOW:
            assert broken.source.status is Status.COMPLETED, broken.story()
            assert broken.destination.status is Status.COMPLETED, broken.story()
        check_owner(broken, owner)


def test_dead_while_its_last_call_is_answered(journey, tmp_path, kill_at, monkeypatch):
    """The guest's process finds that every page is there only when it looks again."""
    waits = kill_at("destination.nothing-missing")
    with Recovering(broken_journey(journey), tmp_path) as broken:
        first, has_arrived = iter([False]), IncomingJob.has_arrived
        monkeypatch.setattr(
            IncomingJob, "has_arrived", lambda job: next(first, True) and has_arrived(job)
        )
        broken.source.control.migrate(broken.destination.listen())
        broken.until_postcopy()
        broken.hurry()
        wait_until(lambda: not waits(), DEADLINE_S, "nobody came to the end")
        broken.destination.until(Status.COMPLETED)
        assert "postcopy-paused" in broken.destination.story()
        assert broken.destination.error is None
        broken.until_settled()
        broken.verify(broken.destination)


@pytest.mark.parametrize("point", RECOVERY)
def test_recovery(journey, tmp_path, kill_at, point):
    waits = kill_at(point)
    with Recovering(broken_journey(journey), tmp_path) as broken:
        channel = broken.start()
        broken.until_postcopy()
        if point == "source.adopted":
            broken.source.engine.kill()
        elif point == "destination.adopted":
            broken.destination.engine.kill()
        channel.break_all()
        broken.until_settled()
        if point != "destination.adopted":
            try:
                broken.resume()
            except PostcopyError:
                assert point == "source.adopted"
        wait_until(lambda: not waits(), DEADLINE_S, f"nobody came to {point}")
        broken.source.until(Status.POSTCOPY_PAUSED)
        check_owner(broken, DESTINATION)
