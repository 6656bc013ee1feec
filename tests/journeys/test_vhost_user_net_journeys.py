"""A guest moves with a network, DPDK's testpmd at each side; every frame and all memory are right.

A testpmd at work keeps a CPU busy, so each is started late.
"""

import contextlib

import numpy as np
import pytest

from fakes.awakening import AT_ONCE, half_awake, woken
from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK
from fakes.snapshots import Portrait
from fakes.testpmd import NetworkOfJourney, Testpmd
from fakes.waiting import wait_until
from faults.recovering import LASTS, Recovering
from machine.networks import check_net, frames, net_workload
from postcopy.status import Status

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]


@pytest.fixture
def with_network(journey, tmp_path):
    """As ``journey``, of a guest whose frames come back."""
    with contextlib.ExitStack() as stack:

        def begin(**more):
            network = NetworkOfJourney(stack, tmp_path)
            sockets = [each.path for each in network.back_ends]
            return journey(network.workload(), back_ends=sockets, **more), network

        yield begin


def wait_for_frames(side, workload):
    """Until some more have come back."""
    read = side.machine.read_memory
    before = frames(read, workload)
    wait_until(lambda: frames(read, workload) > before + 9, 20, "frames come back")


def test_a_back_end_dies_in_the_midst_of_a_precopy(with_network):
    """The first round lasts until frames come back again: without them the guest writes nothing."""
    slow = NEVER_ENDS | {"max-bandwidth": 64 << 10, "x-dirty-tracking": "kvm"}
    trip, network = with_network(parameters=slow)
    trip.migrate()
    trip.source.wait(Status.ACTIVE)
    network.kill(0)
    wait_for_frames(trip.source, trip.workload)
    trip.source.set(parameters=QUICK)
    network.serve(1)
    trip.finish()
    wait_for_frames(trip.destination, trip.workload)


def test_frames_come_back_while_pages_are_missing(with_network, tmp_path):
    """Nothing but what is asked for comes, the connection breaks, and the guest is recovered."""
    trip, network = with_network(capabilities=POSTCOPY, parameters=LASTS)
    with Recovering(trip, tmp_path) as broken:
        channel = broken.start()
        broken.until_postcopy()
        network.serve(1)
        wait_for_frames(broken.destination, trip.workload)
        channel.break_all()
        broken.source.wait(Status.POSTCOPY_PAUSED)
        broken.destination.wait(Status.POSTCOPY_PAUSED)
        broken.recover()
        trip.verify(broken.destination)


def test_it_wakes_while_nearly_all_is_missing_and_its_back_end_dies(with_network, tmp_path):
    trip, network = with_network()
    network.serve(1)
    side = half_awake(trip, tmp_path / "image")
    wait_for_frames(side, trip.workload)
    network.kill(1)
    wait_for_frames(side, trip.workload)
    assert side.status is Status.POSTCOPY_ACTIVE
    side.set(parameters=AT_ONCE)
    woken(trip)


def test_a_background_snapshot(tmp_path):
    """The back end stands still until all is saved, and the image has what was at its beginning."""
    with (
        Testpmd(tmp_path / "one", "--no-mlockall", "--auto-start") as one,
        Portrait(net_workload(delay_cycles=0), vhost_user_net=str(one.path)) as portrait,
    ):
        portrait.take(f"file:{tmp_path}/image")
        wait_for_frames(portrait, portrait.workload)
        portrait.machine.stop()
        check_net(portrait.machine.read_memory, portrait.workload)
        with Testpmd(tmp_path / "other", "--no-mlockall") as other:
            portrait.more["vhost_user_net"] = str(other.path)
            image = portrait.load(f"file:{tmp_path}/image")
            assert np.array_equal(image.ram(), portrait.machine.then)
