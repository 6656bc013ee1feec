"""The source's end of the second connection."""

import contextlib
import socket
import threading

import pytest

from postcopy.channel.sockets import SocketChannel
from postcopy.errors import ChannelBroken
from postcopy.source.counters import Counters
from postcopy.source.preempt_channel import PreemptChannel


class Bench:
    def __init__(self, **options):
        ours, self.peer = socket.socketpair()
        self.causes = []
        self.broken = threading.Event()
        self.channel = SocketChannel(ours, "preempt")
        self.preempt = PreemptChannel(self.channel, Counters(), self.note, **options)
        self.preempt.start()

    def note(self, cause):
        self.causes.append(cause)
        self.broken.set()

    def close(self):
        self.preempt.close()
        self.peer.close()


@pytest.fixture
def bench():
    with contextlib.closing(Bench()) as made:
        yield made


def test_an_end_that_nobody_expects_is_told_with_the_likely_reason(bench):
    bench.peer.close()
    assert bench.broken.wait(10)
    (cause,) = bench.causes
    assert isinstance(cause, ChannelBroken)
    assert "is postcopy-preempt switched on there?" in str(cause)


def test_an_expected_end_is_not_told(bench):
    bench.preempt.expect_end()
    bench.peer.close()
    for thread in threading.enumerate():
        if thread.name == "preempt":
            thread.join(10)
    assert not bench.causes


@pytest.mark.parametrize("sends_end", [False, True])
def test_an_old_qemu_alone_is_told_that_no_more_pages_come(sends_end):
    with contextlib.closing(Bench(sends_end=sends_end)) as bench:
        bench.preempt.expect_end()
        bench.preempt.shutdown()
        end_of_ram = bytes.fromhex("0000000000000010")
        assert bench.peer.recv(100) == (end_of_ram if sends_end else b"")


def test_nor_is_one_of_our_own(bench):
    bench.preempt.shutdown()
    bench.preempt.close()  # on return its thread has ended
    bench.preempt.close()
    assert not bench.causes


def test_what_the_peer_says_is_passed_over(bench):
    bench.peer.send(b"nothing is to be said here")
    bench.peer.close()
    assert bench.broken.wait(10)
    assert len(bench.causes) == 1


def test_it_knows_what_has_been_taken(bench):
    bench.channel.send(b"12345")
    assert bench.peer.recv(5) == b"12345"
    assert bench.preempt.taken_bytes <= 5
