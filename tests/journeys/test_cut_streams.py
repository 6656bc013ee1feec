"""A stream that ends too early, at any byte: one clear error, never a hang, never a guest that runs.

The streams are recorded from a guest of ours that really moved; the cut ones go to a destination in
this process, whose guest only notes whether it was told to run.
"""

import contextlib
import random
import socket
import threading

import pytest

from fakes.guest import LocalDestination
from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK, Journey, hammer, idle
from fakes.waiting import wait_until
from faults.relay import Relay
from postcopy.errors import ChannelBroken, StreamCut, StreamError
from postcopy.parameters import Capabilities
from postcopy.status import Status

MEMORY_MIB = 8
EVERY_BYTE = 4096
AT_RANDOM = 200
ROOM = 32 << 10
"""So much a socket takes at once: no thread is needed to write it."""


def record(folder, *, postcopy):
    """Move a small guest through a relay; return all that its source sent."""
    parameters = NEVER_ENDS | {"max-bandwidth": 1 << 20} if postcopy else QUICK
    workload = hammer(MEMORY_MIB, fill_kib=4096)
    with contextlib.ExitStack() as stack:
        trip = stack.enter_context(Journey(workload, capabilities=POSTCOPY, parameters=parameters))
        uri = trip.destination.listen()
        with Relay(f"unix:{folder}/relay", uri) as relay:
            trip.source.control.migrate(relay.uri)
            if postcopy:
                trip.source.wait(Status.ACTIVE)
                wait_until(lambda: trip.source.control.info().ram.transferred > 500_000)
                trip.source.control.start_postcopy()
            trip.finish()
            assert postcopy == ("postcopy-active" in trip.source.story())
            return relay.recorded()


@pytest.fixture(scope="module")
def precopy(tmp_path_factory):
    return record(tmp_path_factory.mktemp("precopy"), postcopy=False)


@pytest.fixture(scope="module")
def postcopy(tmp_path_factory):
    return record(tmp_path_factory.mktemp("postcopy"), postcopy=True)


@pytest.fixture(params=["precopy", "postcopy"])
def stream(request):
    return request.getfixturevalue(request.param)


def feed(data, memory_mib=MEMORY_MIB, capabilities=POSTCOPY):
    """Give a destination these bytes and no more; return how it ended, its error, its guest's calls."""
    ours, theirs = socket.socketpair()
    destination = LocalDestination(
        theirs.detach(), memory_mib << 20, Capabilities(frozenset(capabilities))
    )
    writer = threading.Thread(target=_write, args=(ours, data), daemon=True)
    if len(data) <= ROOM:
        _write(ours, data)
    else:
        writer.start()
    try:
        status = destination.run()
        return status, destination.job.error, destination.guest.calls
    finally:
        destination.close()
        if writer.ident is not None:
            writer.join(10)
        ours.close()
        assert not writer.is_alive()


def _write(ours, data):
    with contextlib.suppress(OSError):  # it has refused what came before
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)


def end_of_ownership(data):
    """The first length with which the guest is the destination's."""
    low, high = 0, len(data)
    while low < high:
        middle = (low + high) // 2
        if feed(data[:middle])[0] is Status.FAILED:
            low = middle + 1
        else:
            high = middle
    return low


def test_the_whole_stream_is_taken(stream):
    status, error, calls = feed(stream)
    assert (status, error, calls) == (Status.COMPLETED, None, ["resume"])


def test_cut_at_each_byte(stream, precopy):
    ours_from = end_of_ownership(stream)
    assert ours_from > EVERY_BYTE
    # Both begin with the same bytes: these are cut in the one of a precopy.
    same = zip(stream, precopy, strict=False)
    first = next((at for at, (ours, other) in enumerate(same) if ours != other), 0)
    points = [*range(first, EVERY_BYTE)]
    points += random.Random(2).sample(range(EVERY_BYTE, ours_from), AT_RANDOM)
    points += range(ours_from - 64, ours_from)
    for length in points:
        status, error, calls = feed(stream[:length])
        assert status is Status.FAILED, length
        assert isinstance(error, StreamCut | ChannelBroken), (length, error)
        assert "\n" not in str(error)
        assert calls == [], length


def test_cut_after_switchover_pauses(postcopy):
    ours_from = end_of_ownership(postcopy)
    for length in random.Random(3).sample(range(ours_from, len(postcopy)), 40):
        status, error, calls = feed(postcopy[:length])
        assert status is Status.POSTCOPY_PAUSED, length
        assert isinstance(error, StreamCut | ChannelBroken), (length, error)
        assert calls == ["resume"]


def test_any_byte_changed_is_refused_or_harmless(stream):
    """Neither a hang nor an error that has no name, wherever the stream is damaged."""
    chosen = random.Random(4)
    for _ in range(300):
        at = chosen.randrange(3000)
        damaged = bytearray(stream)
        damaged[at] ^= 1 << chosen.randrange(8)
        status, error, _ = feed(bytes(damaged))
        assert status in {Status.COMPLETED, Status.FAILED, Status.POSTCOPY_PAUSED}, at
        assert (error is None) == (status is Status.COMPLETED)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "The stream ends in the header"),
        (b"GET / HTTP/1.1\r\n\r\n", "Not a migration stream"),
        (b"\0" * 4096, "Not a migration stream"),
        (b"QEVM\0\0\0\x02", "SaveVM v2 format is obsolete"),
    ],
)
def test_what_is_no_stream(data, says):
    status, error, calls = feed(data)
    assert status is Status.FAILED
    assert isinstance(error, StreamError)
    assert says in str(error)
    assert calls == []


# --- the source's side, through a relay


@pytest.mark.parametrize("point", [0, 1, 100, 333, 4096, 100_000, 3_000_000])
@pytest.mark.parametrize("capabilities", [(), POSTCOPY], ids=["plain", "advised"])
def test_a_cut_before_switchover_leaves_the_guest_here(journey, tmp_path, point, capabilities):
    trip = journey(hammer(), parameters=NEVER_ENDS, capabilities=capabilities)
    with Relay(f"unix:{tmp_path}/relay", trip.destination.listen()) as relay:
        relay.cut_after(point)
        trip.source.control.migrate(relay.uri)
        trip.source.wait(Status.FAILED)
        trip.destination.wait(Status.FAILED)
    for side in trip.sides:
        assert side.error
        assert "\n" not in side.error
    assert not trip.destination.machine.running
    trip.verify_source()


@pytest.mark.parametrize("kind", ["break", "source engine", "destination engine"])
def test_a_break_after_switchover_pauses_both_and_loses_nothing(journey, tmp_path, kind):
    slow = NEVER_ENDS | {"max-postcopy-bandwidth": 256 << 10}
    trip = journey(hammer(), parameters=slow, capabilities=POSTCOPY)
    source, destination = trip.source, trip.destination
    with Relay(f"unix:{tmp_path}/relay", destination.listen()) as relay:
        source.control.migrate(relay.uri)
        source.control.start_postcopy()
        destination.wait(Status.POSTCOPY_ACTIVE)
        source.wait(Status.POSTCOPY_ACTIVE)
        # Where KVM walks the guest's page tables itself, a vCPU that waits for one of them cannot be
        # stopped (Linux 6.18), and this test wants to look at a guest that stands still.
        destination.machine.read_memory(0, 8 * 4096)
        if kind == "break":
            relay.break_all()
        else:
            (source if kind.startswith("source") else destination).engine.kill()
        source.wait(Status.POSTCOPY_PAUSED)
        destination.wait(Status.POSTCOPY_PAUSED)
    assert not source.machine.owned
    assert not source.machine.running
    assert source.error
    assert destination.error
    destination.machine.stop()
    have = destination.received()
    assert not have.all()
    memory = source.ram()
    memory[have] = destination.ram()[have]
    flat = memory.reshape(-1)
    trip.check_memory(lambda address, length: flat[address : address + length].tobytes())


def test_an_idle_guest_that_is_cut_at_its_end(journey, tmp_path):
    """Everything but the last byte has arrived, so the guest is still the source's."""
    trip = journey(idle(), parameters=QUICK)
    with Relay(f"unix:{tmp_path}/relay", trip.destination.listen()) as relay:
        relay.stall()
        trip.source.control.migrate(relay.uri)
        wait_until(lambda: relay.connections, 10, "connected")
        relay.break_all()
        trip.source.wait(Status.FAILED)
    trip.verify_source()
