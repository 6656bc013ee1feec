"""Many watchers share one map, whose cost bounds how often it is made."""

import threading
from types import SimpleNamespace

import pytest

from postcopy.errors import EngineDied, WrongState
from postcopy.link.guest.memory_maps import MemoryMaps
from postcopy.statistics import MemoryMap
from postcopy.status import Status

MAP = MemoryMap(False, "s", {"at-source": 1}, (("ram", 1, 1),))


class Engine:
    """An engine that takes ``cost_s`` of the clock's time for a map."""

    def __init__(self):
        self.asked = 0
        self.now = 100.0
        self.cost_s = 0.0
        self.error = None

    def ask(self, _message):
        return self

    def wait(self, _timeout_s):
        self.asked += 1
        self.now += self.cost_s
        if self.error is not None:
            raise self.error
        return MAP


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def maps(engine):
    job = SimpleNamespace(incoming=False, busy=True, status=Status.ACTIVE)
    state = SimpleNamespace(
        work=job,
        keeper=SimpleNamespace(lost={}),
        engines=SimpleNamespace(link=engine),
        guest=SimpleNamespace(regions=lambda: [SimpleNamespace(name="ram", size_bytes=8192)]),
    )
    made = MemoryMaps(state, lambda: engine.now)
    made.job = job
    return made


def test_ten_watchers_take_one_map(engine, maps):
    threads = [threading.Thread(target=maps.look) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.asked == 1
    engine.now += 0.3
    assert maps.look() == MAP
    assert engine.asked == 2


def test_a_map_that_costs_much_is_made_rarely(engine, maps):
    engine.cost_s = 0.1
    maps.look()
    for _ in range(9):
        engine.now += 1
        maps.look()
    assert engine.asked == 1
    engine.now += 2
    maps.look()
    assert engine.asked == 2


def test_another_status_has_another_map(engine, maps):
    maps.look()
    maps.job.busy, maps.job.status = False, Status.COMPLETED
    assert maps.look().pages == {"in-place": 2}
    assert engine.asked == 1


def test_an_engine_that_is_gone_has_none(engine, maps):
    engine.error = EngineDied("it is gone")
    with pytest.raises(WrongState, match="the memory's map is not known"):
        maps.look()
