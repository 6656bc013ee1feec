"""``quit`` and SIGTERM to a guest's process while an engine stands still: see :mod:`faults.orders`."""

from pathlib import Path

import pytest

from fakes.commands import DEADLINE_S, pair
from fakes.pair import hammer
from fakes.waiting import wait_until
from faults.orders import DESTINATION, SOURCE
from postcopy.parameters import Capability

pytestmark = pytest.mark.kvm

ENDS_S = 15
PRECOPY = (
    "source.guest-stopped",
    "source.given-up",
    "source.end-sent",
    "destination.devices-loaded",
)
POSTCOPY = ("source.package-sent", "source.pushing", "destination.owning", "destination.running")
SETTLED = {None, "none", "failed", "cancelled", "completed", "postcopy-paused"}


CASES = [
    (step, to, ("quit", "SIGTERM")[(number + second) % 2])
    for number, step in enumerate((*PRECOPY, *POSTCOPY))
    for second, to in enumerate((SOURCE, DESTINATION))
]


def begin(source, target, folder, *, postcopy):
    for machine in (source, target):
        state = {"capability": "postcopy-ram", "state": postcopy}
        machine.ask("migrate-set-capabilities", capabilities=[state])
    uri = {"uri": f"unix:{folder}/way"}
    target.ask("migrate-incoming", **uri, **{"exit-on-error": False})
    limits = {"max-bandwidth": 1 << 40, "downtime-limit": 0 if postcopy else 2000}
    source.ask("migrate-set-parameters", **limits)
    source.ask("migrate", **uri)
    if postcopy:
        source.ask("migrate-start-postcopy")


@pytest.mark.parametrize(("step", "to", "end"), CASES)
def test_the_other_side_has_it_or_says_that_it_has_not(tmp_path, stalled, step, to, end):
    stall = stalled(step)
    with pair(tmp_path, "hammer") as (source, target):
        begin(source, target, tmp_path, postcopy=step in POSTCOPY)
        stall.wait()
        gone, left = (source, target) if to == SOURCE else (target, source)
        if end == "quit":
            assert gone.ask("quit") == {"return": {}}
        else:
            gone.process.terminate()
        assert gone.process.wait(ENDS_S) == 0
        stall.go_on()
        wait_until(lambda: left.migration_status() in SETTLED, DEADLINE_S, left.migration_status)
        state = left.ask("query-status")["return"]
        assert state["running"] is (state["x-owner"] == "ours")
        if to == DESTINATION and state["x-owner"] in {"ours", "unknown"}:
            left.ask("cont")
            assert left.ask("query-status")["return"]["running"]


@pytest.mark.parametrize("step", ["source.connected", "snapshot.connected"])
def test_a_command_that_has_just_begun_ends_with_the_process(journey, tmp_path, stalled, step):
    """It reads nothing, so that the end of its input does not end it."""
    stall = stalled(step)
    trip = journey(hammer())
    if step.startswith("snapshot"):
        trip.source.set((Capability.BACKGROUND_SNAPSHOT,))
    pid = tmp_path / "pid"
    trip.source.control.migrate(f"exec:echo $$ > {pid}.new; mv {pid}.new {pid}; sleep 1000 & wait")
    stall.wait()
    wait_until(pid.exists, DEADLINE_S, "the command has begun")
    trip.source.control.close()
    process = Path("/proc") / pid.read_text().strip()
    wait_until(lambda: not process.exists(), ENDS_S, "the command has ended")
