"""The engine at work: who is started when, and what its death means to those who ask it."""

import socket
import threading

import pytest

from fakes.waiting import wait_until
from postcopy.errors import EngineDied, WrongState
from postcopy.link.engine_process import EnginePool
from postcopy.link.engines import Engines
from postcopy.link.rpc import Link


class FakeEngine:
    """An engine in this process; it answers ``echo``, and dies of ``die``."""

    def __init__(self):
        self._ours, theirs = socket.socketpair()
        self.link = None
        self.ended = threading.Event()
        handlers = {"echo": lambda text: text, "die": self._die}
        self.far = Link(theirs, handlers, on_end=self.ended.set)
        self.far.start()

    def _die(self):
        self.far.close()

    def connect(self, handlers, on_end):
        self.link = Link(self._ours, handlers, on_end=on_end)
        self.link.start()
        return self.link

    def end(self):
        if self.link is None:
            self._ours.close()
        else:
            self.link.close()


class FakePool:
    """Hands out engines; ``first`` is called before each."""

    def __init__(self, first=lambda: None):
        self._first = first
        self.taken = []

    def prepare(self, delay_s=0.0):
        pass

    def take(self):
        self._first()
        self.taken.append(FakeEngine())
        return self.taken[-1]

    def close(self):
        pass


@pytest.fixture
def told():
    return []


@pytest.fixture
def engines(told):
    made = Engines(lambda _: {}, told.append, FakePool())
    yield made
    made.close()
    for engine in made._pool.taken:
        assert engine.ended.wait(10)


def test_one_at_work_does_what_it_is_told(engines):
    with pytest.raises(EngineDied, match="echo: no engine is at work"):
        engines.call("echo", text="x")
    engines.start()
    assert engines.call("echo", text="x") == "x"


def test_who_hears_of_a_death_finds_it_dealt_with(engines, told):
    engines.start()
    with pytest.raises(EngineDied):
        engines.call("die")
    assert told == [engines.current]


def test_the_end_of_one_that_could_not_adopt_is_not_taken_for_that_of_the_next(engines, told):
    with pytest.raises(EngineDied):
        engines.adopt("die")
    so_far = list(told)
    _, answer = engines.adopt("echo", text="x")
    assert answer == "x"
    assert told == so_far == engines._pool.taken[:1]


def test_none_is_started_once_it_is_closed(told):
    """It would hold a userfaultfd that nobody closes, and the guest's vCPUs with it."""
    arrived, go = threading.Event(), threading.Event()
    pool = FakePool(lambda: (arrived.set(), go.wait(10)))
    engines = Engines(lambda _: {}, told.append, pool)
    refused = []

    def start():
        with pytest.raises(WrongState, match="no engine is started any more"):
            engines.start()
        refused.append(True)

    starter = threading.Thread(target=start)
    starter.start()
    assert arrived.wait(10)
    engines.close()
    go.set()
    starter.join(10)
    assert refused == [True]
    assert engines.current is None
    assert pool.taken[0].ended.wait(10)


def test_a_spare_that_has_died_is_not_put_to_work():
    pool = EnginePool()
    pool.prepare()
    spare = pool._spare
    spare.kill()
    engine = pool.take()
    try:
        assert engine is not spare
        assert not engine.is_dead
    finally:
        engine.end()
        pool.close()
        wait_until(lambda: engine.is_dead, 10, "its end")
