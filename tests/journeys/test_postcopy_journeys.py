"""Postcopy: the guest runs at its destination first, and each page comes when it is touched."""

import pytest

from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK, hammer, idle, tiny
from postcopy.errors import WrongState
from postcopy.parameters import Capability
from postcopy.statistics import LATENCY_BUCKETS
from postcopy.status import Status

SLOW = NEVER_ENDS | {"max-postcopy-bandwidth": 0}


def switch(trip, rounds):
    """Begin, and ask for postcopy after so many rounds."""
    trip.migrate()
    if rounds:
        trip.source.wait_rounds(rounds)
    trip.source.control.start_postcopy()
    trip.finish()
    assert "postcopy-active" in trip.source.story()
    assert "postcopy-active" in trip.destination.story()


@pytest.mark.parametrize("rounds", [0, 1, 4], ids=["at_once", "after_a_round", "late"])
@pytest.mark.parametrize("vcpus", [1, 4])
def test_moves(journey, rounds, vcpus):
    switch(journey(hammer(vcpus=vcpus), capabilities=POSTCOPY, parameters=SLOW), rounds)


def test_an_idle_guest(journey):
    # Slow, or precopy would have ended before anybody could ask.
    switch(journey(idle(), capabilities=POSTCOPY, parameters=SLOW), 0)


@pytest.mark.parametrize("tracking", ["kvm", "pagemap"])
def test_either_way_of_tracking(journey, tracking):
    parameters = SLOW | {"x-dirty-tracking": tracking}
    switch(journey(hammer(vcpus=2), capabilities=POSTCOPY, parameters=parameters), 2)


@pytest.mark.parametrize(
    "accelerators", [("unicorn", "unicorn"), ("kvm", "unicorn"), ("unicorn", "kvm")], ids="-".join
)
def test_between_accelerators(journey, accelerators):
    parameters = SLOW | {"max-bandwidth": 1 << 20}
    trip = journey(tiny("unicorn"), accelerators, capabilities=POSTCOPY, parameters=parameters)
    switch(trip, 0)


@pytest.mark.parametrize(
    "transparent",
    [(False, False), (True, False), (False, True)],
    ids=["small-small", "huge-small", "small-huge"],
)
def test_where_the_kernel_gives_no_huge_pages(journey, transparent):
    trip = journey(hammer(vcpus=2), capabilities=POSTCOPY, parameters=SLOW, transparent=transparent)
    switch(trip, 1)


def test_two_gibibytes_that_are_mostly_empty(journey):
    trip = journey(hammer(2048, vcpus=2), capabilities=POSTCOPY, parameters=SLOW)
    switch(trip, 1)
    assert trip.source.control.info().ram.transferred < 256 << 20


def test_over_a_unix_socket(journey, tmp_path):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=SLOW)
    trip.migrate(f"unix:{tmp_path}/socket")
    trip.source.control.start_postcopy()
    trip.finish()


def test_with_a_pause_before_switchover(journey):
    capabilities = [*POSTCOPY, Capability.PAUSE_BEFORE_SWITCHOVER]
    trip = journey(hammer(), capabilities=capabilities, parameters=SLOW)
    trip.migrate()
    trip.source.control.start_postcopy()
    trip.source.wait(Status.PRE_SWITCHOVER)
    trip.source.control.continue_(Status.PRE_SWITCHOVER)
    trip.finish()
    assert "postcopy-active" in trip.source.story()


def test_a_stopped_guest_moves_and_stays_stopped(journey):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=SLOW, paused=True)
    trip.migrate()
    trip.source.control.start_postcopy()
    trip.finish()
    assert not trip.destination.machine.running
    assert (trip.destination.ram() == trip.source.ram()).all()
    trip.destination.machine.cont()
    trip.paused = False
    trip.verify(trip.destination)


def test_start_postcopy_before_and_after_does_nothing(journey):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=QUICK)
    with pytest.raises(WrongState, match="must be started after migration has been started"):
        trip.source.control.start_postcopy()
    trip.migrate()
    trip.finish()
    trip.source.control.start_postcopy()
    assert trip.source.status is Status.COMPLETED
    assert not trip.source.machine.owned


def test_start_postcopy_without_the_capability_is_refused(journey):
    trip = journey(hammer())
    with pytest.raises(WrongState, match="Enable postcopy with migrate_set_capability before"):
        trip.source.control.start_postcopy()
    trip.migrate()
    trip.finish()


def test_cancel_after_switchover_is_refused(journey):
    parameters = NEVER_ENDS | {"max-postcopy-bandwidth": 8 << 20}
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=parameters)
    trip.migrate()
    trip.source.control.start_postcopy()
    trip.source.wait(Status.POSTCOPY_ACTIVE)
    with pytest.raises(WrongState, match=r"^Postcopy migration in progress, cannot cancel\.$"):
        trip.source.control.cancel()
    trip.finish()


def test_blocktime_and_latencies_agree(journey):
    # At full speed so little memory may be there before the guest runs.
    parameters = SLOW | {"max-postcopy-bandwidth": 8 << 20}
    trip = journey(hammer(vcpus=2), capabilities=POSTCOPY, parameters=parameters)
    switch(trip, 0)
    info = trip.destination.control.info()
    source = trip.source.control.info()
    faults = sum(info.postcopy_latency_dist)
    assert len(info.postcopy_latency_dist) == LATENCY_BUCKETS
    assert faults > 0
    # A page is asked for once, however many faults there are on it.
    assert 0 < source.ram.postcopy_requests <= faults
    assert len(info.postcopy_vcpu_blocktime_ms) == len(info.postcopy_vcpu_latency_ns) == 2
    measured = info.measured
    assert 0 < max(measured.blocktime_us) <= source.total_time_ms * 1000
    assert 0 <= measured.overlapped_blocktime_us <= min(measured.blocktime_us)
    assert info.postcopy_blocktime_ms == measured.overlapped_blocktime_us // 1000
    assert info.postcopy_vcpu_blocktime_ms == tuple(us // 1000 for us in measured.blocktime_us)
    p50, p99 = measured.fault_latency_p50_us, measured.fault_latency_p99_us
    assert 0 < p50 <= p99 <= measured.fault_latency_max_us
    slowest = max(n for n, count in enumerate(info.postcopy_latency_dist) if count)
    assert 1 << slowest <= measured.fault_latency_max_us + 1 <= 2 << slowest
    assert source.ram.postcopy_bytes > 0


def test_without_the_capability_no_blocktime_is_told(journey):
    trip = journey(hammer(), capabilities=[Capability.POSTCOPY_RAM], parameters=SLOW)
    switch(trip, 0)
    assert trip.destination.control.info().postcopy_blocktime_ms is None
