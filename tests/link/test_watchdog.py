"""Which engine hangs."""

import socket
import threading

import pytest

from fakes.waiting import wait_until
from postcopy.link.guest.watchdog import Watchdog
from postcopy.link.protocol import Beats
from postcopy.link.rpc import Link


class Slow:
    def slow(self): ...


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    asked, release = threading.Event(), threading.Event()
    near = Link(ours, {"slow": lambda: release.wait(20)})
    far = Link(theirs, {"say_alive": asked.set})
    near.start()
    far.start()
    yield near, far, asked, release
    release.set()
    far.close()
    near.wait_over()


def test_who_has_said_nothing_for_so_long_hangs(ends):
    near, far, asked, _ = ends
    hung = []
    Watchdog(near, 2, hung.append).start()
    assert asked.wait(10)
    far.note(Beats.alive)
    wait_until(lambda: hung, 20, "it is noticed")
    assert hung == [2.0]


def test_who_talks_does_not_hang(ends):
    near, far, _, _ = ends
    hung = []
    Watchdog(near, 2, hung.append).start()
    pause = threading.Event()
    for _ in range(20):
        far.note(Beats.alive)
        pause.wait(0.2)
    assert hung == []


def test_who_is_not_listened_to_does_not_hang(ends):
    """It is this process that is late then."""
    near, far, _, release = ends
    hung = []
    Watchdog(near, 2, hung.append).start()
    far.note(Beats.alive)
    far.note(Slow.slow)  # its handler keeps the reader from hearing what comes after
    threading.Event().wait(4)
    assert hung == []
    release.set()
