"""The engine at work: who is started when, and what its death means to those who ask it."""

import socket
import subprocess
import threading

import pytest

from fakes.engine import FakeCommands, FakePool
from fakes.stacks import stacks
from fakes.waiting import wait_until
from postcopy.errors import EngineDied, HostCannot, WrongState
from postcopy.link.guest.engine_process import EngineProcess
from postcopy.link.guest.engine_slot import EnginePool, EngineSlot
from postcopy.link.guest.job import OrderLock


@pytest.fixture(autouse=True)
def engines_start():
    """Each is a new interpreter, as a user has it."""


@pytest.fixture
def told():
    return []


@pytest.fixture
def engines(told):
    made = EngineSlot(lambda _: {}, told.append, FakePool())
    yield made
    made.close()
    for engine in made._pool.taken:
        assert engine.ended.wait(10)


def test_one_at_work_does_what_it_is_told(engines):
    with pytest.raises(EngineDied, match="echo: no engine is at work"):
        engines.call(FakeCommands.echo, text="x")
    engines.start()
    assert engines.call(FakeCommands.echo, text="x") == "x"


def test_who_hears_of_a_death_finds_it_dealt_with(engines, told):
    engines.start()
    with pytest.raises(EngineDied):
        engines.call(FakeCommands.die)
    assert told == [engines.current]


def test_the_end_of_one_that_could_not_adopt_is_not_taken_for_that_of_the_next(engines, told):
    with pytest.raises(EngineDied):
        engines.adopt(FakeCommands.die)
    so_far = list(told)
    _, answer = engines.adopt(FakeCommands.echo, text="x")
    assert answer == "x"
    assert told == so_far == engines._pool.taken[:1]


@pytest.mark.parametrize("name", ["engine-link", "watchdog"])
def test_one_for_which_there_is_no_thread_is_let_go_of(told, no_threads, name):
    engines = EngineSlot(lambda _: {}, told.append, EnginePool())
    try:
        no_threads.refuse(name)
        with pytest.raises(HostCannot, match="raise the limit of threads"):
            engines.start()
        assert engines.current is None
        no_threads.allow()
        assert not engines.start().wait_over(0)
    finally:
        engines.close()


def test_none_is_started_once_it_is_closed(told):
    """It would hold a userfaultfd that nobody closes, and the guest's vCPUs with it."""
    arrived, go = threading.Event(), threading.Event()
    pool = FakePool(lambda: (arrived.set(), go.wait(10)))
    engines = EngineSlot(lambda _: {}, told.append, pool)
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


class DeadOnArrival(FakePool):
    """The first of its engines have died unseen before they are put to work."""

    def __init__(self, deaths):
        super().__init__()
        self.deaths = deaths

    def take(self):
        if self.deaths == 0:
            return super().take()
        self.deaths -= 1
        ours, theirs = socket.socketpair()
        engine = EngineProcess(Unreaped(), ours)
        answer = engine.ask(FakeCommands.die)
        theirs.close()
        with pytest.raises(EngineDied):
            answer.wait(10)
        engine.link.wait_over()
        self.taken.append(engine)
        return engine


class Unreaped:
    """A process closes its files before it can be waited for."""

    def __init__(self):
        self._child = subprocess.Popen(["true"])
        self.pid = self._child.pid

    def wait(self):
        return self._child.wait()

    def poll(self):
        return None


def in_time(function):
    """What it returns; a function that hangs fails the test."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(20)
    assert found, f"it hangs\n{stacks()}"
    return found[0]


def test_one_that_has_died_before_it_is_put_to_work_is_replaced():
    told = []

    def ended(engine):  # as MigrationControl does it
        told.append(engine)
        if engines.current is engine:
            engines.end()

    engines = EngineSlot(lambda _: {}, ended, DeadOnArrival(2))
    try:
        assert in_time(engines.start).call(FakeCommands.echo, text="x") == "x"
        assert told == []
    finally:
        engines.close()


def test_engines_that_all_die_before_they_are_put_to_work_are_said():
    engines = EngineSlot(lambda _: {}, lambda _: engines.end(), DeadOnArrival(100))

    def start():
        with pytest.raises(EngineDied, match="die before they get anything to do"):
            engines.start()
        return True

    assert in_time(start)
    assert engines.current is None


def test_no_engine_is_called_under_a_lock_that_its_answer_may_need():
    """Its status is taken under that lock before its answer: the call would never return."""
    lock, refused = OrderLock(), []
    engines = EngineSlot(
        lambda _: {}, lambda _: None, FakePool(), may_call=lambda: not lock.is_held
    )
    engines.start()

    def call():
        try:
            return engines.call(FakeCommands.echo, text="x")
        except RuntimeError as error:
            refused.append(str(error))

    try:
        assert call() == "x"
        with lock, lock:
            assert call() is None
            assert in_time(call) == "x"  # another thread may
        assert call() == "x"
        assert refused == ["echo is called under a lock that its answer may need"]
    finally:
        engines.close()
