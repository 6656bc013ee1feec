"""``switchover-ack`` between two machines of ours, of which neither has to make anything ready."""

import pytest

from fakes.pair import hammer
from postcopy.parameters import Capability
from postcopy.status import Status

WANTED = (Capability.RETURN_PATH, Capability.SWITCHOVER_ACK)
LEGACY = {"x-switchover-ack-legacy": True}


@pytest.mark.parametrize("here", [True, False], ids=["legacy here", "of 11.1 here"])
@pytest.mark.parametrize("paused", [True, False], ids=["stopped", "running"])
def test_a_legacy_destination_lets_any_source_switch_over(journey, paused, here):
    trip = journey(hammer(), capabilities=WANTED, paused=paused)
    trip.source.set(parameters=LEGACY if here else {})
    trip.destination.set(parameters=LEGACY)
    trip.migrate()
    trip.finish()


def test_without_a_word_of_the_destination(journey):
    trip = journey(hammer(), capabilities=WANTED)
    trip.migrate()
    trip.finish()


def test_by_postcopy(journey):
    trip = journey(hammer(), capabilities=(*WANTED, Capability.POSTCOPY_RAM))
    trip.source.set(parameters=LEGACY | {"downtime-limit": 0, "max-bandwidth": 8 << 20})
    trip.destination.set(parameters=LEGACY)
    trip.migrate()
    trip.source.control.start_postcopy()
    trip.finish()


@pytest.mark.parametrize("lacking", ["the parameter", "the capability"])
def test_a_source_that_waits_for_what_will_not_come_is_told_so(journey, lacking):
    trip = journey(hammer(), capabilities=WANTED)
    trip.source.set(parameters=LEGACY)
    if lacking == "the capability":
        trip.destination.control.set_capabilities({Capability.SWITCHOVER_ACK: False})
        trip.destination.set(parameters=LEGACY)
    trip.migrate()
    trip.source.wait(Status.FAILED)
    assert trip.source.error == (
        "the destination does not acknowledge the switchover as QEMU did before 11.1; switch "
        "switchover-ack and x-switchover-ack-legacy on there too, or the latter off here"
    )
    assert "active" not in trip.source.story()
    trip.verify_source()
