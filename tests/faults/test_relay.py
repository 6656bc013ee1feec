"""The relay does what it says, or tests that use it prove nothing."""

import pytest

from fakes.waiting import wait_until
from faults.relay import Relay, Way
from postcopy.channel.address import TcpAddress, UnixAddress, parse
from postcopy.channel.connect import connect
from postcopy.channel.listen import Listener
from postcopy.errors import ChannelBroken


@pytest.fixture(params=["tcp", "unix"])
def relay(request, tmp_path):
    unix = request.param == "unix"
    address = UnixAddress(str(tmp_path / "target")) if unix else TcpAddress("127.0.0.1", 0)
    listen = f"unix:{tmp_path}/relay" if unix else "tcp:127.0.0.1:0"
    with Listener(address) as listener, Relay(listen, str(listener.addresses[0])) as relay:
        relay.target_listener = listener
        yield relay


def ends(relay):
    return connect(parse(relay.uri)), relay.target_listener.accept(10)


def send_for_ever(channel):
    while True:
        channel.send(bytes(4096))


def receive_exactly(channel, n_bytes):
    room = memoryview(bytearray(n_bytes))
    got = 0
    while got < n_bytes:
        now = channel.receive_into(room[got:])
        assert now, f"ended after {got} bytes"
        got += now
    return bytes(room)


def test_passes_on_and_records_both_ways(relay):
    near, far = ends(relay)
    near.send(b"up")
    far.send(b"down!")
    assert receive_exactly(far, 2) == b"up"
    assert receive_exactly(near, 5) == b"down!"
    wait_until(lambda: relay.recorded(Way.DOWN) == b"down!", 10, "recorded")
    assert relay.recorded() == b"up"
    near.close()
    assert far.receive_into(memoryview(bytearray(1))) == 0
    far.close()


@pytest.mark.parametrize("n_bytes", [0, 1, 1000, 50_000])
def test_cuts_at_the_very_byte(relay, n_bytes):
    relay.cut_after(n_bytes)
    near, far = ends(relay)
    with pytest.raises(ChannelBroken):
        send_for_ever(near)
    relay.wait_for_cut()
    receive_exactly(far, n_bytes)
    assert far.receive_into(memoryview(bytearray(1))) == 0
    assert len(relay.recorded()) == n_bytes
    again = ends(relay)  # a new connection is not cut
    again[0].send(bytes(50_001))
    receive_exactly(again[1], 50_001)
    for channel in (near, far, *again):
        channel.close()


def test_stalls_and_goes_on(relay):
    near, far = ends(relay)
    relay.stall()
    near.send(b"x")
    wait_until(lambda: relay.connections, 10, "connected")
    assert relay.recorded() == b""
    relay.flow()
    assert receive_exactly(far, 1) == b"x"
    relay.delay(0.001)
    near.send(b"y")
    assert receive_exactly(far, 1) == b"y"
    relay.break_all()
    assert far.receive_into(memoryview(bytearray(1))) == 0
    near.close()
    far.close()


def test_a_stalled_relay_can_be_closed(relay):
    near, far = ends(relay)
    relay.stall()
    near.send(bytes(100))
    near.close()
    far.close()
