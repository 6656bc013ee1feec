"""Who watches over a silent peer: told at once what happens, it never waits for real silence."""

import socket
import threading

from postcopy.channel.peer_timeout import AckedBytes, PeerTimeout
from postcopy.channel.sockets import SocketChannel

SHORT_MS = 20


class Peer:
    """What a watch asks, and what it said."""

    def __init__(self, *, waiting=True, timeout_ms=SHORT_MS):
        self.signs = 0
        self.looks = 0
        self.waiting = waiting
        self.timeout_ms = timeout_ms
        self.looked_often = threading.Event()
        self.silent = threading.Event()
        self.seconds = []
        self.lives = False
        self.watch = PeerTimeout(
            lambda: self.timeout_ms, self.look, lambda: self.waiting, self.fell_silent
        )

    def look(self):
        self.looks += 1
        self.signs += self.lives
        if self.looks > 30:
            self.looked_often.set()
        return self.signs

    def fell_silent(self, seconds):
        self.seconds.append(seconds)
        self.silent.set()


def test_a_silent_peer_is_reported_once_with_the_limit():
    peer = Peer()
    peer.watch.start()
    assert peer.silent.wait(10)
    peer.watch.stop()
    assert peer.seconds == [SHORT_MS / 1000]


def test_a_peer_that_gives_signs_is_not():
    peer = Peer()
    peer.lives = True
    peer.watch.start()
    assert peer.looked_often.wait(10)
    peer.watch.stop()
    assert not peer.seconds


def test_nor_is_one_from_whom_nothing_is_waited_for():
    peer = Peer(waiting=False)
    peer.watch.start()
    assert peer.looked_often.wait(10)
    peer.watch.stop()
    assert not peer.seconds


def test_it_may_be_stopped_before_it_begins_and_twice_and_by_itself():
    peer = Peer()
    peer.watch.stop()
    peer.watch.stop()
    other = Peer()
    other.fell_silent = lambda seconds: None
    other.watch = PeerTimeout(
        lambda: SHORT_MS,
        other.look,
        lambda: True,
        lambda _: (other.watch.stop(), other.silent.set()),
    )
    other.watch.start()
    assert other.silent.wait(10)
    other.watch.stop()


def test_what_a_peer_does_not_take_is_no_sign_of_life():
    """A Unix socket counts more than it was given as pending: what was taken seemed to change."""
    ours, peer = socket.socketpair()
    with peer, SocketChannel(ours, "unix") as channel:
        taken = AckedBytes(channel)
        found = set()
        for _ in range(4):
            channel.send(bytes(5000))
            found.add(taken.of(channel.sent_bytes))
        assert found == {0}
        assert len(peer.recv(20000, socket.MSG_WAITALL)) == 20000
        assert taken.of(channel.sent_bytes) == 20000
