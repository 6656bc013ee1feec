"""Guests that sleep in an image, and wake from it."""

from pathlib import Path

from fakes.pair import DEADLINE_S, Journey, Side
from fakes.waiting import wait_until
from postcopy.image.finalize import make_manifest
from postcopy.image.formats import open_image
from postcopy.image.manifest import Times
from postcopy.parameters import Capability
from postcopy.restore_options import RestoreOptions
from postcopy.status import Status

FORMS = ("mapped-ram", "stream")
TRICKLE = {"max-postcopy-bandwidth": 64 << 10}
"""What comes unasked takes minutes: there is time to do something meanwhile."""
AT_ONCE = {"max-postcopy-bandwidth": 0}


def put_to_sleep(trip: Journey, path: Path, form: str = "mapped-ram") -> Path:
    """Save the guest of a journey, and let go of where it was."""
    if form == "mapped-ram":
        trip.source.set([Capability.MAPPED_RAM])
    trip.source.control.migrate(f"file:{path}")
    trip.source.wait(Status.COMPLETED)
    return path


def wake(side: Side, path: Path, *, lazy: bool = True, **wishes: object) -> None:
    """Begin to wake it there."""
    side.control.restore(RestoreOptions(str(path), lazy=lazy, **wishes), exit_on_error=False)


def half_awake(trip: Journey, path: Path, form: str = "mapped-ram") -> Side:
    """The guest runs, nearly nothing of it has come, and next to nothing comes unasked."""
    side = trip.destination
    side.set(parameters=TRICKLE)
    wake(side, put_to_sleep(trip, path, form))
    side.wait(Status.POSTCOPY_ACTIVE)
    # On a busy host all that it works on may have come by now: no more faults would.
    wait_until(lambda: measured(side).demand_faults, DEADLINE_S, "a demand fault")
    return side


def woken(trip: Journey) -> Side:
    """Wait for the end of a restore, and look at all of the guest's memory."""
    side = trip.destination
    side.wait(Status.COMPLETED, Status.POSTCOPY_ACTIVE)
    side.wait(Status.COMPLETED)
    assert side.error is None
    trip.verify(side)
    return side


def measured(side: Side):
    return side.control.info().measured


def wait_for_faults(side: Side, more: int = 1) -> None:
    """Until so many pages more have been brought because somebody waited for them."""
    before = measured(side).demand_faults or 0

    def served() -> bool:
        nonlocal before
        faults = measured(side).demand_faults or 0
        before = min(
            before, faults
        )  # an engine counts anew; we may have seen the last one's figure
        return faults >= before + more

    wait_until(served, DEADLINE_S, f"{more} demand faults")


def write_manifest(path: Path) -> None:
    """Put a manifest beside an image, as it is now."""
    with open_image(path) as image:
        make_manifest(image, Times("2026-11-22T06:00:00.000+00:00")).save(path)
