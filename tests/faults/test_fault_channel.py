"""The fault channel does what it says."""

import pytest

from fakes.waiting import wait_until
from faults.fault_channel import PACKAGE, RESUME_ACK, RUN, FaultChannel, Way
from faults.test_relay import ends, receive_exactly
from postcopy.channel.address import TcpAddress
from postcopy.channel.listen import Listener
from postcopy.errors import ChannelBroken


@pytest.fixture
def channel():
    with (
        Listener(TcpAddress("127.0.0.1", 0)) as listener,
        FaultChannel("tcp:127.0.0.1:0", str(listener.addresses[0])) as channel,
    ):
        channel.target_listener = listener
        yield channel


@pytest.fixture
def both(channel):
    near, far = ends(channel)
    yield near, far
    near.close()
    far.close()


def receive_rest(channel):
    room, found = memoryview(bytearray(4096)), b""
    try:
        while count := channel.receive_into(room):
            found += bytes(room[:count])
    except ChannelBroken:
        pass
    return found


@pytest.mark.parametrize("at", [None, 0, 2])
@pytest.mark.parametrize("split", [False, True])
def test_cuts_at_a_record_however_it_comes(channel, both, at, split):
    near, far = both
    fault = channel.cut(RUN, at=at)
    data = b"before" + RUN.begin + b"behind"
    for piece in [data[:8], data[8:]] if split else [data]:
        near.send(piece)
        if split and piece is not data:
            receive_exactly(far, 6)
            split = False
    fault.wait()
    passed = receive_rest(far)
    whole = b"before" + RUN.begin[: len(RUN.begin) if at is None else at]
    # What had gone before its beginning was known cannot be taken back.
    assert whole.endswith(passed) or passed == RUN.begin[:2]


def test_corrupts_one_byte(channel, both):
    near, far = both
    fault = channel.corrupt(PACKAGE, at=2)
    near.send(b"x" + PACKAGE.begin)
    wrong = bytearray(b"x" + PACKAGE.begin)
    wrong[3] ^= 0xFF
    assert receive_exactly(far, len(wrong)) == wrong
    fault.wait()


def test_stalls_at_an_answer_until_told_to_go_on(channel, both):
    near, far = both
    fault = channel.stall(RESUME_ACK)
    far.send(RESUME_ACK.begin + b"later")
    fault.wait()
    assert receive_exactly(near, len(RESUME_ACK.begin)) == RESUME_ACK.begin
    assert channel.recorded(Way.DOWN) == RESUME_ACK.begin
    channel.flow()
    assert receive_exactly(near, 5) == b"later"


def test_a_black_hole_swallows_both_ways_and_leaves_the_sockets_open(channel, both):
    near, far = both
    fault = channel.black_hole(3)
    near.send(b"abcdef")
    fault.wait()
    assert receive_exactly(far, 3) == b"abc"
    near.send(b"more")
    far.send(b"answer")
    assert channel.recorded() == b"abc"
    assert channel.recorded(Way.DOWN) == b""
    channel.break_all()
    assert receive_rest(near) == receive_rest(far) == b""


def test_nor_does_the_end_of_one_side_leave_a_black_hole(channel, both):
    near, far = both
    channel.black_hole(3)
    near.send(b"abcdef")
    assert receive_exactly(far, 3) == b"abc"
    near.close()
    (connection,) = channel.connections
    wait_until(lambda: connection.ways_open == 1, 10, "one way has ended")
    far.send(b"still there")
    assert not connection.cut.is_set()
    channel.break_all()
    assert receive_rest(far) == b""
