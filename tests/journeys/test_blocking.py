"""Threads of the guest's process wait for pages that do not come; what they must not hold up goes on.

docs/blocking.md has the tests of the other threads in its tables.
"""

import contextlib
import os
import re
import signal
import threading
from pathlib import Path

import pytest

from fakes.awakening import AT_ONCE, put_to_sleep, wake, woken
from fakes.awakening import TRICKLE as LAZY_TRICKLE
from fakes.commands import Running
from fakes.pair import DEADLINE_S, POSTCOPY, TRICKLE, hammer
from fakes.waiting import wait_until
from machine.drives import disk_workload, make_disk
from postcopy.machine.machine import Machine
from postcopy.machine.workload import PAGE_BYTES
from postcopy.monitor.controls import Backend
from postcopy.monitor.server import serve_qmp
from postcopy.status import Status

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]

PATIENT = 100_000  # looks at an engine that does not answer, before it is taken for hung


def waits(thread_id):
    """Whether the kernel has this thread of ours wait for a page."""
    try:
        return Path(f"/proc/self/task/{thread_id}/wchan").read_text() == "handle_userfault"
    except OSError:
        return False  # it has just ended


def waiting():
    """The names of our threads that wait for a page."""
    return {each.name for each in threading.enumerate() if waits(each.native_id)}


def wait_until_it_waits(name):
    wait_until(lambda: name in waiting(), DEADLINE_S, f"{name} waits for a page")


@contextlib.contextmanager
def monitor(side, folder):
    """``ask(COMMAND, ...)``: each time by another client of the QMP of that side."""
    server = serve_qmp(f"unix:{folder}/qmp", Backend(side.machine, side.control, side.bus))
    try:
        yield Running(folder, "qmp").ask
    finally:
        server.close()


class Loading(Machine):
    """Tells when its devices are about to be loaded.

    :ivar before: what it calls then; ``loader``: the thread that loads.
    """

    loader = 0

    def load_devices(self, states):
        self.loader = threading.get_native_id()
        self.before()
        super().load_devices(states)


class Trip:
    """A guest on its way to such a machine, and the engine that is to bring its pages."""

    def __init__(self, journey, workload, **more):
        self.journey = journey(workload, kind=Loading, hang_looks=PATIENT, **more)
        self.source, self.destination = self.journey.source, self.journey.destination
        for side in (self.source, self.destination):
            side.set(
                parameters={"x-link-timeout": 0}
            )  # an engine that is stopped is no broken link
        self.brings = self.source
        self.stopped = None
        # Of those that the guest has filled, and does not write to any more.
        self.cold = workload.slice_address(workload.vcpus) - PAGE_BYTES
        self.there = self.source.machine.read_memory(self.cold, 8)
        self.read = []

    def stop_pages(self):
        """What is missing does not come from now on; a stop that it prevents is refused soon."""
        self.destination.machine.run_control._park_timeout_s = 0.2
        self.stopped = self.brings.stop_engine()

    def let_pages_come(self):
        if self.stopped:
            os.kill(self.stopped, signal.SIGCONT)
            self.destination.machine.run_control._park_timeout_s = DEADLINE_S
        self.stopped = None

    def stop_pages_and_read(self):
        """As a device that needs memory when it is loaded."""
        self.stop_pages()
        self.read.append(self.destination.machine.read_memory(self.cold, 8))

    def go(self, before):
        """Begin the postcopy; ``before`` is called when devices are about to be loaded."""
        self.destination.machine.before = before
        self.journey.migrate()
        self.source.control.start_postcopy()

    def arrive(self):
        self.let_pages_come()
        self.source.set(parameters={"max-postcopy-bandwidth": 0})
        self.journey.finish()


@pytest.fixture
def trip(journey):
    made = []

    def make(workload, **more):
        made.append(Trip(journey, workload, **more))
        return made[-1]

    yield make
    for each in made:
        each.let_pages_come()  # else a test that has failed waits for its end


def stops(ask):
    """Whether the guest is stopped at once, and goes on; or it is said why not."""
    answer = ask("stop")
    if "error" in answer:  # the processor reads page tables: no signal ends that on some hosts
        assert "a page of the guest's page tables that has not come" in answer["error"]["desc"]
        assert ask("query-status")["return"]["running"] is True
        return False
    assert ask("query-status")["return"]["running"] is False
    assert ask("cont")["return"] == {}
    return True


def test_a_vcpu_and_a_client_of_the_monitor(trip, tmp_path):
    moving = trip(hammer(), capabilities=POSTCOPY, parameters=TRICKLE)
    moving.go(moving.stop_pages)
    line = {"command-line": f"xp /8xb {moving.cold:#x}"}
    said = []
    with monitor(moving.destination, tmp_path) as ask:
        wait_until_it_waits("vcpu-0")
        client = threading.Thread(target=lambda: said.append(ask("human-monitor-command", **line)))
        client.start()
        wait_until_it_waits("qmp-worker")
        assert ask("query-migrate")["return"]["status"] == "postcopy-active"
        if stops(ask):
            wait_until_it_waits("vcpu-0")
        assert not said
        moving.arrive()
        client.join(DEADLINE_S)
    (answer,) = said
    shown = answer["return"].split(":")[1].split()
    assert bytes(int(each, 16) for each in shown) == moving.there


def stop_refused_for_the_drive(moving, ask):
    """Let pages come until a request waits for one; return what an order to stop is told then."""
    for _ in range(100):
        wait_until(lambda: waiting() & {"the drive", "vcpu-0"}, DEADLINE_S, "a wait for a page")
        if "the drive" in waiting():
            answer = ask("stop")
            if "error" in answer and "the drive" in waiting():
                return answer["error"]["desc"]
            ask("cont")  # its page was on the way
        moving.let_pages_come()  # it is the vCPU that needs a page to make its next request
        wait_until(lambda: "vcpu-0" not in waiting(), DEADLINE_S, "the page")
        moving.stop_pages()
    raise AssertionError("no request has waited for a page")


def test_the_thread_of_the_drive(trip, tmp_path):
    drive = make_disk(tmp_path / "disk")
    workload = disk_workload(delay_cycles=0)
    moving = trip(workload, drive=drive, capabilities=POSTCOPY, parameters=TRICKLE)
    moving.go(moving.stop_pages)
    with monitor(moving.destination, tmp_path) as ask:
        refusal = stop_refused_for_the_drive(moving, ask)
        # A vCPU may wait for a page table at the same time, and is named then.
        assert re.match(r"(the drive|vCPU 0) did not stop within 0.2 s: it waits for ", refusal)
        assert "that has not come; let the page come" in refusal
        assert ask("query-status")["return"]["running"] is True
        assert ask("query-migrate")["return"]["status"] == "postcopy-active"
        assert "the drive" in waiting()
        moving.arrive()


def check_loading(moving):
    """A thread of the link waits in the midst of loading; others of this process do not."""
    side = moving.destination
    wait_until(lambda: waits(side.machine.loader), DEADLINE_S, "the device waits for a page")
    assert side.control.info().status is side.status
    assert not side.machine.running
    assert not side.machine.owned
    assert waits(side.machine.loader)


def test_a_device_that_is_loaded_in_postcopy(trip):
    moving = trip(hammer(), capabilities=POSTCOPY, parameters=TRICKLE)
    moving.go(moving.stop_pages_and_read)
    check_loading(moving)
    assert moving.destination.status is Status.POSTCOPY_DEVICE
    moving.arrive()
    assert moving.read == [moving.there]


def test_a_device_that_is_loaded_in_a_lazy_restore(trip, tmp_path):
    moving = trip(hammer())
    side = moving.brings = moving.destination
    side.machine.before = moving.stop_pages_and_read
    side.set(parameters=LAZY_TRICKLE)
    wake(side, put_to_sleep(moving.journey, tmp_path / "image"))
    check_loading(moving)
    moving.let_pages_come()
    side.set(parameters=AT_ONCE)
    woken(moving.journey)
    assert moving.read == [moving.there]
