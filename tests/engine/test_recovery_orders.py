"""What an engine does with the orders for a recovery, and in which order."""

import contextlib
import socket
import threading

import pytest

from postcopy.destination.destination import Destination
from postcopy.engine import incoming
from postcopy.engine.engine import Engine
from postcopy.engine.incoming import Incoming
from postcopy.engine.outgoing import Outgoing
from postcopy.source.source import Source
from postcopy.status import Status, StatusMachine


class Job:
    """A job that only notes what it is told, and by which thread."""

    def __init__(self):
        self.calls = []
        self.done = threading.Event()

    def begin_recovery(self, *_):
        self.calls.append(("begin", threading.current_thread().name))

    def recover(self, *_):
        self.calls.append(("recover", threading.current_thread().name))
        self.done.set()

    def stop_waiting(self):
        self.calls.append(("stop waiting", threading.current_thread().name))


class PausedSource(Job, Source):
    """A source that waits to be resumed."""


class PausedDestination(Job, Destination):
    """A destination that waits for an address."""


@pytest.fixture
def engine():
    ours, theirs = socket.socketpair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        made = Engine(theirs)
        made.progress = StatusMachine(begin=Status.POSTCOPY_PAUSED)
        yield made


def test_a_resume_is_answered_before_anything_is_sent_to_the_peer(engine):
    """An engine that dies in a recovery must not take its answer to the order with it."""
    engine.job = job = PausedSource()
    orders, here = Outgoing(engine), threading.current_thread().name
    orders.resume_source(uri="tcp:127.0.0.1:1")
    assert job.calls == [("begin", here)]
    orders.go_on()
    assert job.done.wait(10)
    assert job.calls == [("begin", here), ("recover", "source")]


def test_another_address_can_be_given_as_soon_as_the_first_is_listened_on(engine, monkeypatch):
    """An end of the wait must find the present listener, not the one of the time before."""

    class Listener:
        def __init__(self, _):
            pass

        def described(self):
            return []

    monkeypatch.setattr(incoming, "Listener", Listener)
    engine.job = job = PausedDestination()
    here = threading.current_thread().name
    Incoming(engine).recover_destination(uri="tcp:127.0.0.1:0")
    assert job.done.wait(10)
    assert job.calls == [("stop waiting", here), ("begin", here), ("recover", "destination")]
