"""The thread that pushes reads what the destination says, while it has to wait anyway."""

import itertools
import socket
import threading

import pytest

from postcopy.channel.rate_limit import RateLimiter
from postcopy.channel.sockets import SocketChannel
from postcopy.errors import ChannelBroken, StreamError
from postcopy.source import return_path
from postcopy.source.flow_control import FlightWindow
from postcopy.source.push import PushWaits
from postcopy.source.return_path import ReturnPath
from postcopy.stream.layout import BlockLayout
from postcopy.stream.pings import FIRST_WINDOW_PING
from postcopy.stream.records import Pong, RequestPages, Shut
from postcopy.stream.return_path import ReturnPathDecoder, encode_message

RAM = "ram"
REQUEST = encode_message(RequestPages(RAM, 0, 4096))


class Push:
    """A return path, and a thread that would push: the test's own."""

    def __init__(self):
        ours, self.peer = socket.socketpair()
        self.channel = SocketChannel(ours, "source")
        self.over = threading.Event()
        self.window = FlightWindow(10, 1)
        self.served = []
        self.serving = threading.Condition()
        self.answers = ReturnPath(
            self.channel,
            ReturnPathDecoder({RAM: BlockLayout(1 << 20, 4096)}),
            self.serve,
            self.window.pong,
            self.end,
        )
        self.answers.start()
        self.waits = PushWaits(self.over, self.answers)

    def serve(self, name, start_bytes, length_bytes):
        with self.serving:
            self.served.append(threading.current_thread())
            self.serving.notify_all()

    def end(self):
        self.over.set()
        self.window.close()

    def close(self):
        self.waits.read(here=False)
        self.channel.shutdown()
        self.answers.join()
        self.channel.close()
        self.peer.close()


@pytest.fixture
def push():
    made = Push()
    yield made
    made.close()


def test_a_page_is_asked_of_the_thread_that_reads(push):
    me = threading.current_thread()
    push.waits.read(here=True)
    push.peer.send(REQUEST * 3)
    while len(push.served) < 3:
        assert not push.waits.wait(10)
    assert push.served == [me] * 3
    push.waits.read(here=False)
    push.peer.send(REQUEST)
    with push.serving:
        assert push.serving.wait_for(lambda: len(push.served) == 4, 10)
    assert push.served[3] is not me


def test_what_has_come_by_now_is_taken_without_waiting(push):
    push.waits.read(here=True)
    push.peer.send(REQUEST)
    push.waits.read_now()
    push.waits.read_now()
    assert len(push.served) == 1


def test_a_wait_for_the_bandwidth_limit_serves(push):
    push.waits.read(here=True)
    push.peer.send(REQUEST)
    limiter = RateLimiter(1000)
    assert limiter.wait(110, push.waits)
    assert push.served == [threading.current_thread()]


def test_a_wait_for_the_window_takes_the_pong_that_opens_it(push):
    push.waits.read(here=True)
    assert push.window.sent(20) == FIRST_WINDOW_PING
    assert not push.window.is_open
    push.peer.send(REQUEST + encode_message(Pong(FIRST_WINDOW_PING)))
    push.waits.wait_for(push.window)
    assert push.window.is_open
    assert len(push.served) == 1


@pytest.mark.parametrize("here", [True, False])
def test_the_destinations_verdict_ends_every_wait(push, here):
    push.waits.read(here=here)
    push.window.sent(20)
    push.peer.send(encode_message(Shut(1)))
    push.waits.wait_for(push.window)
    while not push.waits.wait(10):
        pass
    with pytest.raises(StreamError, match="could not take the guest"):
        push.answers.wait_shut()
    push.waits.read(here=True)  # nobody is there any more to pass it
    assert not push.answers.reader.is_borrowed


@pytest.mark.parametrize("here", [True, False])
def test_an_end_ends_every_wait(push, here):
    push.waits.read(here=here)
    push.peer.close()
    push.window.sent(20)
    push.waits.wait_for(push.window)
    assert push.over.wait(10)
    with pytest.raises(ChannelBroken, match="closed the connection"):
        push.answers.wait_shut()


@pytest.mark.parametrize("here", [True, False])
def test_so_does_a_break_of_our_own(push, here):
    push.waits.read(here=here)
    push.window.sent(20)
    threading.Thread(target=push.channel.shutdown).start()
    push.waits.wait_for(push.window)
    assert push.over.wait(10)


@pytest.mark.parametrize("here", [True, False])
def test_nonsense_is_refused_by_name_whoever_reads_it(push, here):
    push.waits.read(here=here)
    push.peer.send(b"\xff" * 64)
    while not push.waits.wait(10):
        pass
    with pytest.raises(StreamError, match="RP: Received invalid message 0xffff"):
        push.answers.wait_shut()


def test_without_answers_it_only_waits():
    over = threading.Event()
    waits = PushWaits(over, None)
    waits.read(here=True)
    waits.read_now()
    over.set()
    assert waits.wait(10)
    assert waits.is_set()


def test_it_is_told_when_an_answer_was_read_whenever_one_asks(push, monkeypatch):
    now = itertools.count(100.0)
    monkeypatch.setattr(return_path.time, "monotonic", now.__next__)
    push.peer.send(encode_message(Pong(7)))
    assert push.answers.wait_pong(7) == 7
    push.peer.send(encode_message(Shut(0)))
    shut_s = push.answers.wait_shut()
    next(now)
    assert push.answers.pong_s(7) == 100.0
    assert push.answers.wait_shut() == shut_s > 100.0
