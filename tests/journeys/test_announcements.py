"""A guest is announced where it has arrived, as the parameters ``announce-*`` say."""

import pytest

from fakes.pair import NEVER_ENDS, hammer
from fakes.waiting import wait_until
from postcopy.parameters import Capability
from postcopy.status import Status

ROUNDS = 3
PARAMETERS = {"announce-rounds": ROUNDS, "announce-initial": 1, "announce-step": 1}


class Network:
    """Counts the announcements to it; where the guest ran then is what matters."""

    def __init__(self, machine):
        self.told = []
        self._machine = machine
        machine.announcer.device = self

    def announce(self):
        self.told.append(self._machine.owned)


@pytest.mark.parametrize("way", ["precopy", "postcopy", "file"])
def test_at_its_destination_and_nowhere_else(journey, tmp_path, way):
    postcopy = way == "postcopy"
    trip = journey(hammer(), capabilities=[Capability.POSTCOPY_RAM] if postcopy else ())
    if postcopy:
        trip.source.set(parameters=NEVER_ENDS)
    here, there = Network(trip.source.machine), Network(trip.destination.machine)
    trip.destination.set(parameters=PARAMETERS)
    if way == "file":
        uri = f"file:{tmp_path}/saved"
        trip.source.control.migrate(uri)
        trip.source.wait(Status.COMPLETED)
        trip.destination.listen(uri)
    else:
        trip.migrate()
    if postcopy:
        trip.source.control.start_postcopy()
    trip.finish()
    wait_until(lambda: len(there.told) >= ROUNDS, 10, lambda: str(there.told))
    assert there.told == [True] * ROUNDS
    assert here.told == []
