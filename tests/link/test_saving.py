"""A guest is stopped, and its devices are saved while its engine does something else."""

import socket
import threading

import pytest

from fakes.waiting import wait_until
from postcopy.errors import EngineDied, GuestError
from postcopy.guest import Description, DeviceState
from postcopy.link.engine.guest_proxy import guest_over
from postcopy.link.rpc import Link

STATES = [DeviceState("cpu", 0, 12, b"registers")]


class SlowToSave:
    """The guest's end of the link: it says nothing of its devices before it is told to."""

    def __init__(self):
        near, far = socket.socketpair()
        self.may_save = threading.Event()
        self.failure = None
        self.saves = 0
        self.saved = False
        description = Description("microvm", kvm=False, vcpu_threads=())
        self.far = Link(
            far,
            {
                "describe": lambda: description,
                "pause": self.pause,
                "pause_and_save": self.save,
                "resume": lambda: None,
            },
        )
        self.near = Link(near, {})
        self.far.start()
        self.near.start()
        self.guest = guest_over(self.near)

    def pause(self, *, to_move=False):
        if self.failure is not None:
            raise self.failure
        return 4711

    def save(self, *, to_move=False):
        self.saves += 1
        assert self.may_save.wait(20)
        self.saved = True
        return STATES

    def close(self):
        self.may_save.set()
        self.near.close()
        self.near.wait_over()
        self.far.wait_over()


@pytest.fixture
def slow():
    made = SlowToSave()
    yield made
    made.close()


def aside(call):
    """Do it on a thread of its own; return that, and what comes of it."""
    found = []

    def run():
        try:
            found.append(call())
        except GuestError as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def test_the_engine_goes_on_while_devices_are_saved(slow):
    saving = slow.guest.pause_to_save()
    assert saving.began_ns == 4711  # as its process says it
    slow.guest.resume()  # any other call
    slow.may_save.set()
    assert saving.states() == STATES
    assert saving.states() == STATES


def test_who_settles_waits_for_the_save(slow):
    thread, found = aside(slow.guest.pause_to_save().settle)
    wait_until(lambda: slow.saves, 10, "the save has begun")
    assert thread.is_alive()
    slow.may_save.set()
    thread.join(10)
    assert found == [None]


def test_a_stop_that_fails_leaves_nothing_under_way(slow):
    """The second of the two calls may stop the guest yet: nobody lets it run before that."""
    slow.failure = GuestError("vCPU 0 cannot be stopped")
    saved_before = []

    def stop():
        try:
            slow.guest.pause_to_save()
        finally:
            saved_before.append(slow.saved)

    thread, found = aside(stop)
    wait_until(lambda: slow.saves, 10, "the save has begun")
    slow.may_save.set()
    thread.join(10)
    assert str(found[0]) == "vCPU 0 cannot be stopped"
    assert saved_before == [True]


def test_the_end_of_the_guests_process_ends_the_wait(slow):
    saving = slow.guest.pause_to_save()
    slow.far.close()
    saving.settle()
    with pytest.raises(EngineDied):
        saving.states()
