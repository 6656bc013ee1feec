"""Two threads, and one descriptor that only one of them reads at a time."""

import os
import socket
import threading
from pathlib import Path

import pytest

from postcopy.kernel.borrowed_reader import BorrowedReader


class Owner:
    """Reads a socket in its own thread, byte by byte, whenever it is its turn."""

    def __init__(self):
        self.ours, self.peer = socket.socketpair()
        self.reader = BorrowedReader(self.ours.fileno())
        self.read = []
        self.came = threading.Condition()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while True:
            self.reader.wait()
            byte = self.ours.recv(1, socket.MSG_DONTWAIT)
            with self.came:
                self.read.append(byte)
                self.came.notify_all()
            if not byte:
                break
        self.reader.end()

    def has_read(self, *expected):
        with self.came:
            return self.came.wait_for(lambda: self.read == list(expected), 10)

    def close(self):
        self.reader.give_back()
        self.peer.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.ours.close()


@pytest.fixture
def owner():
    made = Owner()
    yield made
    made.close()


def test_the_owner_reads_as_long_as_nobody_borrows(owner):
    owner.peer.send(b"a")
    assert owner.has_read(b"a")
    assert not owner.reader.is_borrowed
    owner.reader.give_back()  # without the turn: no harm
    owner.peer.send(b"b")
    assert owner.has_read(b"a", b"b")


def test_what_comes_while_it_is_borrowed_is_the_borrowers(owner):
    owner.reader.borrow()
    assert owner.reader.is_borrowed
    assert not owner.reader.is_readable()
    owner.peer.send(b"ab")
    assert owner.reader.is_readable(None)
    assert owner.ours.recv(1) == b"a"
    assert owner.read == []
    owner.reader.give_back()
    assert not owner.reader.is_borrowed
    assert owner.has_read(b"b")


def test_it_goes_to_and_fro(owner):
    for number in range(200):
        owner.reader.borrow()
        assert owner.reader.is_borrowed
        owner.peer.send(b"x")
        assert owner.reader.is_readable(10)
        if number % 2:
            assert owner.ours.recv(1) == b"x"
        owner.reader.give_back()
    assert owner.has_read(*[b"x"] * 100)


def test_an_owner_that_is_to_find_an_end_gets_the_turn_although_nothing_comes():
    ours, peer = socket.socketpair()
    with ours, peer:
        reader = BorrowedReader(ours.fileno())
        thread = threading.Thread(target=reader.wait, daemon=True)
        thread.start()
        reader.borrow()
        reader.give_back(at_once=True)
        thread.join(10)
        assert not thread.is_alive()
        reader.end()


def test_and_nobody_takes_it_away_before():
    ours, peer = socket.socketpair()
    with ours, peer:
        reader = BorrowedReader(ours.fileno())
        reader.give_back(at_once=True)
        reader.borrow()
        assert not reader.is_borrowed
        reader.wait()
        reader.end()


def test_an_owner_that_has_gone_passes_nothing(owner):
    owner.peer.shutdown(socket.SHUT_WR)
    assert owner.has_read(b"")
    owner.thread.join(10)
    owner.reader.borrow()
    assert not owner.reader.is_borrowed


def test_the_end_of_a_socket_is_noticed_although_it_has_been_closed():
    ours, peer = socket.socketpair()
    reader = BorrowedReader(ours.fileno())
    ours.shutdown(socket.SHUT_RDWR)
    number = ours.fileno()
    ours.close()
    other = os.open("/dev/null", os.O_RDONLY)  # most likely under the same number
    try:
        assert other == number
        reader.wait()
    finally:
        reader.end()
        os.close(other)
        peer.close()


def test_nothing_is_left_open():
    ours, peer = socket.socketpair()
    with ours, peer:
        before = set(Path("/proc/self/fd").iterdir())
        BorrowedReader(ours.fileno()).end()
        assert set(Path("/proc/self/fd").iterdir()) == before
