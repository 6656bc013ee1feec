"""A guest is announced so often and at such times as is set, to a network back end that can."""

import threading

import pytest

from fakes.odd_back_end import LOG_ALL, PROTOCOL, OddBackEnd, number
from fakes.vhost_front_end import (
    GET_FEATURES,
    GET_PROTOCOL_FEATURES,
    PROTOCOL_FEATURES,
    VERSION_1,
)
from fakes.waiting import wait_until
from postcopy.announcement import AnnouncementTimes
from postcopy.machine.announcing import Announcer
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine

SEND_RARP = 19
RARP = 1 << 2
GUEST = bytes.fromhex("525400123456") + bytes(2)
AT_ONCE = AnnouncementTimes(3, 0, 0, 0)


class Network:
    """Counts announcements, and the pauses between them; a pause ends when the test says so."""

    def __init__(self):
        self.told = 0
        self.pauses = []
        self.go_on = threading.Semaphore(0)
        self.announcer = Announcer(self._pause)
        self.announcer.device = self

    def announce(self):
        self.told += 1

    def _pause(self, over, seconds):
        self.pauses.append(seconds)
        self.go_on.acquire()
        return over.is_set()

    def wait(self, told, pauses):
        wait_until(
            lambda: (self.told, len(self.pauses)) == (told, pauses), 5, lambda: str(vars(self))
        )


@pytest.mark.parametrize(
    ("times", "pauses"),
    [
        ((5, 50, 100, 550), [0.05, 0.15, 0.25, 0.35]),
        ((4, 50, 100, 120), [0.05, 0.12, 0.12]),
        ((2, 0, 1, 0), [0]),
        ((1, 50, 100, 550), []),
    ],
)
def test_as_often_as_is_set_at_qemus_times(times, pauses):
    network = Network()
    for _ in pauses:
        network.go_on.release()
    network.announcer.begin(AnnouncementTimes(*times))
    network.wait(times[0], len(pauses))
    assert network.pauses == pauses


def test_no_rounds_are_none_and_end_those_under_way():
    network = Network()
    network.announcer.begin(AnnouncementTimes(9, 1, 1, 1))
    network.wait(1, 1)
    network.announcer.begin(AnnouncementTimes(0, 1, 1, 1))
    network.go_on.release()
    wait_until(lambda: "announce" not in [t.name for t in threading.enumerate()], 5, "the end")
    assert network.told == 1


def test_series_of_other_names_go_on_beside():
    network = Network()
    for name in ("a", "b"):
        network.announcer.begin(AnnouncementTimes(2, 1, 1, 1), name)
    network.wait(2, 2)
    network.go_on.release(2)
    network.wait(4, 2)


@pytest.mark.parametrize("ends", ["close", "begin"])
def test_a_series_ends_when_it_is_replaced_and_with_the_machine(ends):
    network = Network()
    network.announcer.begin(AnnouncementTimes(5, 1, 1, 1))
    network.wait(1, 1)
    if ends == "close":
        network.announcer.close()
    else:
        network.announcer.begin(AnnouncementTimes(1, 1, 1, 1))
        network.wait(2, 1)
    network.go_on.release()
    wait_until(lambda: "announce" not in [t.name for t in threading.enumerate()], 5, "the end")
    assert network.told == (1 if ends == "close" else 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vhost.sock"


def a_machine(path):
    return Machine(MachineConfig(32 << 20, vhost_user_net=str(path)))


def test_the_back_end_is_told_the_guests_address(path):
    answers = {GET_PROTOCOL_FEATURES: number(PROTOCOL | RARP)}
    with OddBackEnd(path, answers) as back_end, a_machine(path) as machine:
        machine.announcer.begin(AT_ONCE)
        wait_until(lambda: back_end.heard.count(SEND_RARP) == 3, 5, lambda: str(back_end.heard))
        assert back_end.payloads[SEND_RARP] == GUEST


def test_one_that_cannot_is_told_nothing(path):
    answers = {GET_FEATURES: number(VERSION_1 | PROTOCOL_FEATURES | LOG_ALL)}
    with OddBackEnd(path, answers) as back_end:
        with a_machine(path) as machine:
            machine.announcer.device.announce()
        wait_until(lambda: not back_end.connected, 5, "the end of the connection")
        assert SEND_RARP not in back_end.heard


def test_one_that_has_gone_is_told_nothing(path):
    answers = {GET_PROTOCOL_FEATURES: number(PROTOCOL | RARP)}
    with OddBackEnd(path, answers) as back_end, a_machine(path) as machine:
        back_end.disconnect()
        wait_until(lambda: not machine.shared_with(), 5, "it is noticed")
        machine.announcer.device.announce()  # raises nothing


def test_without_a_network_there_is_nobody_to_tell():
    with Machine(MachineConfig(32 << 20)) as machine:
        machine.announcer.begin(AT_ONCE)
        assert "announce" not in [thread.name for thread in threading.enumerate()]
