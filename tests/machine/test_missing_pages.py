"""vCPUs at pages that are missing or lost.  In a child: whoever hangs here must not hang pytest."""

import select

from fakes.waiting import wait_until
from kernel.watched import PAGE, in_child
from machine.machines import MIB, Watched, config_for, need, wait_for_progress, wait_for_work
from postcopy.abi.userfaultfd import Feature, RegisterMode
from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.machine import oracle, workload
from postcopy.machine.run_state import RunState

HOT = workload.BASE_ADDRESS
ADDRESS = HOT + 3 * PAGE


def working_guest() -> tuple[Watched, workload.Workload]:
    work = workload.load("hammer", 8 * MIB, 2, hot_bytes=64 << 10)
    watched = Watched(config_for(work, "kvm"))
    watched.machine.start()
    wait_for_work(watched.machine, work)
    watched.machine.pause()
    return watched, work


def take_page_away(watched: Watched, features: Feature) -> tuple[Userfaultfd, bytes, int]:
    (region,) = watched.machine.regions()
    content = watched.machine.read_memory(ADDRESS, PAGE)
    watcher = Userfaultfd.open(features)
    where = region.host_address + ADDRESS
    watcher.register(where, PAGE, RegisterMode.MISSING)
    memfd.punch_hole(region.fd, ADDRESS, PAGE)
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
        (event,) = watcher.read_events()
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
