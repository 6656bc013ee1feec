"""vCPUs at pages that are missing or lost.  In a child: whoever hangs here must not hang pytest."""

import select

from fakes.uffd_events import read_events
from fakes.waiting import wait_until
from kernel.watched import PAGE, in_child
from machine.machines import MIB, Watched, config_for, need, wait_for_progress, wait_for_work
from postcopy.abi.userfaultfd import Feature, RegisterMode
from postcopy.errors import GuestError
from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.machine import oracle, workload
from postcopy.machine.boot import PML4_ADDRESS
from postcopy.machine.run_control import RunState

HOT = workload.BASE_ADDRESS
ADDRESS = HOT + 3 * PAGE


def working_guest() -> tuple[Watched, workload.Workload]:
    work = workload.load("hammer", 8 * MIB, 2, hot_bytes=64 << 10)
    watched = Watched(config_for(work, "kvm"))
    watched.machine.start()
    wait_for_work(watched.machine, work)
    watched.machine.pause()
    return watched, work


def take_page_away(
    watched: Watched, features: Feature, address: int = ADDRESS
) -> tuple[Userfaultfd, bytes, int]:
    (region,) = watched.machine.regions()
    content = watched.machine.read_memory(address, PAGE)
    watcher = Userfaultfd.open(features)
    where = region.host_address + address
    watcher.register(where, PAGE, RegisterMode.MISSING)
    memfd.punch_hole(region.fd, address, PAGE)
    return watcher, content, where


def test_a_vcpu_that_waits_for_a_page_can_be_stopped():
    need("kvm")
    assert in_child(stop_while_waiting) == 0


def stop_while_waiting() -> None:
    watched, work = working_guest()
    machine = watched.machine
    watcher, content, where = take_page_away(watched, Feature.MISSING_SHMEM | Feature.THREAD_ID)
    machine.resume()
    for _ in range(3):
        assert select.select([watcher], [], [], 10)[0]
        (event,) = read_events(watcher)
        assert event.thread_id == machine.vcpu_threads()[0].thread_id
        machine.pause()  # returns although the page has not come
        machine.resume()
    source = Mapping.anonymous(PAGE)
    source.write(0, content)
    assert watcher.copy(where, source.address, PAGE) == PAGE
    wait_for_progress(machine, work)
    machine.pause()
    assert oracle.verify(machine.read_memory, work).ok


def test_a_lost_page_ends_the_guest_and_not_the_process():
    need("kvm")
    assert in_child(touch_a_poisoned_page) == 0


def touch_a_poisoned_page() -> None:
    watched, _ = working_guest()
    machine = watched.machine
    watcher, _, where = take_page_away(watched, Feature.MISSING_SHMEM | Feature.POISON)
    assert watcher.poison(where, PAGE) == PAGE
    machine.resume()
    wait_until(lambda: machine.run_state is RunState.INTERNAL_ERROR, 15)
    assert f"the page at {ADDRESS:#x} is lost (poisoned)" in str(machine.failure)
    assert watched.events[-1] == "STOP"


def test_a_vcpu_that_cannot_be_stopped_does_not_hold_its_user_up():
    need("kvm")
    assert in_child(stop_at_a_missing_page_table) == 0


def stop_at_a_missing_page_table() -> None:
    watched, work = working_guest()
    machine = watched.machine
    machine.run_control._park_timeout_s = 0.2
    # Without a page to map, and with a vCPU that faults, nobody looks at the tables.
    pages = [take_page_away(watched, Feature.MISSING_SHMEM, at) for at in (ADDRESS, PML4_ADDRESS)]
    machine.resume()
    assert select.select([watcher for watcher, _, _ in pages], [], [], 10)[0]
    try:
        machine.stop()
        machine.cont()  # this host can stop it even there
    except GuestError as error:
        assert "page tables that has not come" in str(error)  # noqa: PT017 - in a child
    assert machine.run_state is RunState.RUNNING
    source = Mapping.anonymous(PAGE)
    for watcher, content, where in pages:
        source.write(0, content)
        assert watcher.copy(where, source.address, PAGE) == PAGE
    wait_for_progress(machine, work)
    machine.stop()
    assert oracle.verify(machine.read_memory, work).ok
