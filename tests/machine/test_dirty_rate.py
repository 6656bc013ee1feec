"""The dirty rate of a guest: a number that is known, and what cannot be measured."""

import os
import threading

import numpy as np
import pytest

from fakes.waiting import wait_until
from machine.machines import MIB, Watched, config_for, need, wait_for_progress, wait_for_work
from postcopy.errors import HostCannot, Refused, WrongState
from postcopy.guest import Region, VcpuThread
from postcopy.machine import workload
from postcopy.machine.dirty_rate import DirtyRate, Order


class Written:
    """A guest of two blocks and no vCPUs that run: a test writes, in the middle of a measurement."""

    def __init__(self, *, vcpus=1, log=None):
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, 24 * MIB)
        self.vcpus = [VcpuThread(index, 0) for index in range(vcpus)]
        self.log = log
        self.users = []

    def regions(self):
        return [
            Region("low", 8 * MIB, 4096, 0, 0, self.fd),
            Region("high", 16 * MIB, 4096, 8 * MIB, 0, self.fd, 8 * MIB),
        ]

    def write(self, first_page, pages, data=b"x"):
        for page in range(first_page, first_page + pages):
            os.pwrite(self.fd, data, page * 4096 + 17)

    def start_dirty_log(self, user):
        if self.log is None:
            raise HostCannot("there is no log", "get one")
        self.users.append(user)

    def stop_dirty_log(self, user):
        self.users.remove(user)

    def fetch_dirty_log(self, block, user):
        assert user in self.users
        return np.packbits(self.log[block])


def measured(guest, order, during=lambda: None):
    """What a measurement says; ``during`` runs in the middle of it."""
    rate = DirtyRate(guest, lambda _seconds: bool(during()))
    rate.start(order)
    wait_until(lambda: rate.query()["status"] != "measuring")
    return rate.query()


def test_nothing_has_been_measured():
    assert DirtyRate(Written()).query() == {
        "status": "unstarted",
        "sample-pages": 0,
        "mode": "page-sampling",
        "calc-time-unit": "second",
        "start-time": 0,
        "calc-time": 0,
    }


def test_samples_tell_how_much_was_written_and_holes_stay_holes():
    guest = Written()
    guest.write(0, 2048)
    held = os.fstat(guest.fd).st_blocks
    found = measured(guest, Order(1), lambda: guest.write(0, 0))
    assert (found["dirty-rate"], found["sample-pages"]) == (0, 512)
    assert os.fstat(guest.fd).st_blocks == held
    found = measured(guest, Order(1), lambda: guest.write(0, 2048, b"y"))
    assert found["dirty-rate"] == 8  # all of a block of 8 MiB, in what counts as a second
    assert found["start-time"] > 0


def test_a_time_in_milliseconds_is_told_in_either_unit():
    guest = Written()
    rate = DirtyRate(guest, lambda _seconds: guest.write(0, 6144))
    rate.start(Order(100, "millisecond", 16384))
    wait_until(lambda: rate.query()["status"] == "measured")
    assert rate.query("millisecond")["calc-time"] == 100
    assert rate.query()["calc-time"] == 0
    assert rate.query()["dirty-rate"] == pytest.approx(240, abs=1)


@pytest.mark.parametrize("mode", ["dirty-bitmap", "dirty-ring"])
def test_the_log_is_counted_and_given_back(mode):
    low, high = np.zeros(2048, bool), np.zeros(4096, bool)
    low[:256] = high[-512:] = True
    guest = Written(log={"low": low, "high": high})
    found = measured(guest, Order(1, mode=mode), lambda: None)
    assert found["dirty-rate"] == 3
    assert found.get("vcpu-dirty-rate") == (
        [{"id": 0, "dirty-rate": 3}] if mode == "dirty-ring" else None
    )
    assert found["sample-pages"] == 0
    wait_until(lambda: not guest.users)


def test_what_cannot_be_measured_is_refused_with_the_reason():
    guest = Written(vcpus=2, log={})
    with pytest.raises(Refused, match=r"mode dirty-ring is not enabled.*2 vCPUs"):
        DirtyRate(guest).start(Order(1, mode="dirty-ring"))
    with pytest.raises(Refused, match=r"mode dirty-bitmap is not enabled.*there is no log"):
        DirtyRate(Written()).start(Order(1, mode="dirty-bitmap"))


def test_one_at_a_time_and_the_end_gives_it_up():
    rate = DirtyRate(Written())
    rate.start(Order(60))
    with pytest.raises(WrongState, match=r"^the dirty rate is already being measured\.$"):
        rate.start(Order(1))
    assert rate.query()["status"] == "measuring"
    rate.close()
    wait_until(lambda: rate.query()["status"] == "unstarted")


def test_a_measurement_and_a_migration_share_the_log_of_a_guest():
    need("kvm")
    work = workload.load("hammer", 8 * MIB, hot_bytes=MIB)
    with Watched(config_for(work, "kvm")) as watched:
        machine, middle, go_on = watched.machine, threading.Event(), threading.Event()

        def pause(_seconds):
            middle.set()
            assert go_on.wait(30)

        rate = DirtyRate(machine, pause)
        machine.start()
        wait_for_work(machine, work)
        machine.start_dirty_log()
        rate.start(Order(1, mode="dirty-ring"))
        assert middle.wait(30)
        wait_for_progress(machine, work)
        machine.pause()
        ours = np.unpackbits(machine.fetch_dirty_log(machine.config.ram_name)).sum()
        go_on.set()
        wait_until(lambda: rate.query()["status"] == "measured")
        # The hammer writes within a hot MiB, and two pages beside it.
        assert 2 < ours <= MIB // 4096 + 4
        (vcpu,) = rate.query()["vcpu-dirty-rate"]
        assert (vcpu["id"], vcpu["dirty-rate"] <= 1) == (0, True)
        machine.resume()
        wait_for_progress(machine, work)
        assert machine.fetch_dirty_log(machine.config.ram_name).any()  # ours goes on
        machine.stop_dirty_log()
