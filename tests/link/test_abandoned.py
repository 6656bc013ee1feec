"""A guest whose memory is given up is never let run, however far its engine has come with that."""

import threading
from types import SimpleNamespace

import pytest

from postcopy.errors import WrongState
from postcopy.link.guest.keeper import GuestKeeper
from postcopy.ownership import Move, Ownership


class ArrivingGuest:
    """Its devices are loaded for as long as the test wants."""

    def __init__(self):
        self.ownership = Ownership()
        self.ownership.move(Move.BEGIN)
        self.loading, self.go_on = threading.Event(), threading.Event()
        self.loads = 0

    def __getattr__(self, _):
        return lambda *_: None  # whatever else an engine may ask

    def regions(self):
        return []

    def load_devices(self, _):
        self.loads += 1
        self.loading.set()
        assert self.go_on.wait(10)

    @property
    def owned(self):
        return self.ownership.here

    def resume(self, arrival):
        self.ownership.move(Move.ARRIVE, arrival=arrival)


@pytest.fixture
def scene():
    guest = ArrivingGuest()
    service = GuestKeeper(guest)
    wake = service.handlers()["wake"]
    service.handlers()["page_maps"]()
    ended = []

    def waking():
        try:
            wake(states=[])
            ended.append("runs")
        except WrongState as error:
            ended.append(str(error))

    thread = threading.Thread(target=waking, daemon=True)
    return SimpleNamespace(guest=guest, service=service, thread=thread, ended=ended, wake=wake)


def test_what_is_being_loaded_is_not_run_afterwards(scene):
    scene.thread.start()
    assert scene.guest.loading.wait(10)
    assert scene.service.abandon()
    scene.guest.go_on.set()
    scene.thread.join(10)
    assert not scene.guest.owned
    assert "the incoming migration failed" in scene.ended[0]


def test_who_comes_later_is_refused_before_anything_is_loaded(scene):
    assert scene.service.abandon()
    with pytest.raises(WrongState, match="the incoming migration failed"):
        scene.wake(states=[])
    assert scene.guest.loads == 0


def test_a_guest_that_runs_is_not_given_up(scene):
    scene.guest.go_on.set()
    scene.wake(states=[])
    assert not scene.service.abandon()
    assert scene.guest.owned


def test_another_attempt_is_let_run_and_the_one_before_it_is_not(scene):
    scene.thread.start()
    assert scene.guest.loading.wait(10)
    assert scene.service.abandon()
    scene.guest.ownership.move(Move.AWAIT)  # as the next order does first
    scene.guest.go_on.set()
    scene.thread.join(10)
    assert "given up" in scene.ended[0]
    assert not scene.guest.owned
    scene.guest.loading.clear()
    scene.service.handlers()["wake"](states=[])
    assert scene.guest.owned
