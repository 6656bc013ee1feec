"""The machine's drive: what the guest writes is on it, and what cannot be is refused by name."""

import contextlib
import select
import threading

import pytest

from fakes.uffd_events import read_events
from fakes.waiting import is_inside, wait_until
from kernel.watched import PAGE, in_child
from machine.drives import DISK_BYTES, check_disk, disk_workload, make_disk, writes_and_reads
from machine.machines import MIB, Watched, config_for, need, wait_for_work
from postcopy.abi.userfaultfd import Feature, RegisterMode
from postcopy.errors import GuestError, PageExists, Refused
from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.machine import oracle
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine
from postcopy.machine.run_control import RunState

BUFFERS = 0x200000 + 0x10000
BUFFERS_BYTES = 256 * PAGE
SLOT, STATUS, DRIVER_OK = 7 * 0x200, 0x70, 15
"""Where the drive's registers are, of those of all devices; its status there, when it is used."""


def wait_for_requests(machine, workload):
    """Until the guest has written to its drive, and read from it, once more."""
    before = writes_and_reads(machine.read_memory, workload)

    def used() -> bool:
        assert machine.failure is None, machine.failure
        now = writes_and_reads(machine.read_memory, workload)
        return all(a > b for a, b in zip(now, before, strict=True))

    wait_until(used, 20, "the guest does not use its drive")


def check(machine, workload):
    found = oracle.verify(machine.read_memory, workload)
    assert found.ok, found
    return check_disk(machine.read_memory, workload, machine.config.drive)


@pytest.mark.parametrize(("accelerator", "vcpus"), [("kvm", 1), ("kvm", 3), ("unicorn", 1)])
def test_whenever_it_stands_still_the_drive_and_the_memory_are_right(tmp_path, accelerator, vcpus):
    need(accelerator)
    workload = disk_workload(accelerator, vcpus)
    config = config_for(workload, accelerator, drive=make_disk(tmp_path / "disk"))
    with Machine(config) as machine:
        machine.start()
        wait_for_work(machine, workload)
        for _ in range(4):
            wait_for_requests(machine, workload)
            machine.pause()
            checked = check(machine, workload)
            states = machine.save_devices()
            machine.resume()
        assert checked.writes > DISK_BYTES // 4096
        machine.pause()
        check_an_answer_too_many_is_seen(machine, workload)
        assert "virtio-mmio@00000000feb00e00/virtio-blk" in [each.name for each in states]


def check_an_answer_too_many_is_seen(machine, workload):
    available, used = (workload.device_area + at for at in (0x82, 0x1002))

    def read(address, length):
        if address != used:
            return machine.read_memory(address, length)
        made = int.from_bytes(machine.read_memory(available, 2), "little")
        return ((made + 1) % 65536).to_bytes(2, "little")

    with pytest.raises(AssertionError, match="answered_again=1"):
        check_disk(read, workload, machine.config.drive)


def test_above_the_hole(tmp_path):
    """The registers are found at the same address, however large the memory is."""
    need("kvm")
    workload = disk_workload(fill_bytes=MIB, memory_bytes=5 << 30)
    with Machine(config_for(workload, "kvm", drive=make_disk(tmp_path / "disk"))) as machine:
        machine.start()
        wait_for_work(machine, workload)
        machine.stop()
        check(machine, workload)


def test_a_guest_that_touches_a_drive_that_is_not_there_ends():
    need("kvm")
    workload = disk_workload()
    with Machine(config_for(workload, "kvm")) as machine:
        machine.start()
        wait_until(lambda: machine.run_state is RunState.INTERNAL_ERROR, 20)


@pytest.fixture
def states(tmp_path):
    """What a machine with a drive sends, and its workload."""
    need("kvm")
    workload = disk_workload()
    with Machine(config_for(workload, "kvm", drive=make_disk(tmp_path / "disk"))) as machine:
        machine.start()
        wait_for_work(machine, workload)
        machine.pause()
        return machine.save_devices()


@pytest.mark.parametrize(
    ("size", "why"),
    [
        (None, "the guest has a drive, this machine none; start it with --drive FILE"),
        (DISK_BYTES * 2, "drive has 4096 sectors, .*other has 8192; give both sides the same disk"),
    ],
)
def test_a_machine_without_the_drive_refuses_the_guest(tmp_path, states, size, why):
    drive = None if size is None else make_disk(tmp_path / "other", size)
    with Machine(MachineConfig(32 * MIB, accel="kvm", drive=drive)) as machine:
        machine.start(incoming=True)
        with pytest.raises(GuestError, match=why):
            machine.load_devices(states)


def test_a_guest_that_has_never_used_a_drive_finds_it_reset(tmp_path, states):
    less = [each for each in states if "virtio" not in each.name]
    config = MachineConfig(32 * MIB, accel="kvm", drive=make_disk(tmp_path / "other"))
    with Machine(config) as machine:
        machine.start(incoming=True)
        machine.load_devices(states)
        machine.load_devices(less)
        (section,) = [each for each in machine.save_devices() if "virtio" in each.name]
        assert section.payload[12] == 0  # its status


def refused(tmp_path, **more):
    with pytest.raises(Refused) as refusal:
        Machine(MachineConfig(32 * MIB, **more))
    return str(refusal.value)


def test_what_cannot_be_a_drive(tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    assert "No such file" in refused(tmp_path, drive=str(tmp_path / "none"))
    assert "holds no sector" in refused(tmp_path, drive=str(empty))
    assert "neither a file nor" in refused(tmp_path, drive="/dev/null")
    assert "has no place for a virtio device" in refused(
        tmp_path, drive=str(empty), machine_type="none"
    )


def take_buffers_away(machine, features):
    """The pages that the guest writes the drive from, and reads it into, are missing."""
    (region,) = machine.regions()
    content = machine.read_memory(BUFFERS, BUFFERS_BYTES)
    watcher = Userfaultfd.open(features)
    where = region.host_address + BUFFERS
    watcher.register(where, BUFFERS_BYTES, RegisterMode.MISSING)
    memfd.punch_hole(region.fd, BUFFERS, BUFFERS_BYTES)
    return watcher, content, where


def fault_of_the_drive(machine, watcher, content, where):
    """Serve the vCPU's faults until one is of no vCPU; return its address."""
    source = Mapping.anonymous(BUFFERS_BYTES)
    source.write(0, content)
    vcpus = {each.thread_id for each in machine.vcpu_threads()}
    while True:
        assert select.select([watcher], [], [], 10)[0]
        for event in read_events(watcher):
            page = event.address & -PAGE
            if event.thread_id not in vcpus:
                return page, source
            watcher.copy(page, source.address + page - where, PAGE)


def bring_the_rest(watcher, source, where):
    for at in range(where, where + BUFFERS_BYTES, PAGE):
        with contextlib.suppress(PageExists):
            watcher.copy(at, source.address + at - where, PAGE)


def working_guest(path):
    workload = disk_workload()
    watched = Watched(config_for(workload, "kvm", drive=path))
    watched.machine.start()
    wait_for_work(watched.machine, workload)
    watched.machine.pause()
    return watched.machine, workload


def test_a_drive_that_waits_for_a_page_holds_nothing_up(tmp_path):
    need("kvm")
    path = make_disk(tmp_path / "disk")
    assert in_child(lambda: wait_for_a_page(path)) == 0


def wait_for_a_page(path):
    machine, workload = working_guest(path)
    machine.run_control._park_timeout_s = 0.2
    watcher, content, where = take_buffers_away(machine, Feature.MISSING_SHMEM | Feature.THREAD_ID)
    machine.resume()
    page, source = fault_of_the_drive(machine, watcher, content, where)
    address = BUFFERS + page - where
    try:
        machine.pause()
        raise AssertionError("it has stopped")
    except GuestError as error:
        told = str(error)
        assert told.startswith("the drive did not stop within 0.2 s"), told
        assert f"the guest's page at {address:#x} that has not come" in told
    assert machine.run_state is RunState.RUNNING
    assert machine.read_memory(0x10010, 4) == b"disk"
    bring_the_rest(watcher, source, where)
    wait_for_requests(machine, workload)
    machine.pause()
    check(machine, workload)


def test_a_reset_waits_for_the_page_of_a_request_and_holds_nothing_up(tmp_path):
    need("kvm")
    path = make_disk(tmp_path / "disk")
    assert in_child(lambda: reset_while_the_drive_waits(path)) == 0


def reset_while_the_drive_waits(path):
    machine, _ = working_guest(path)
    watcher, content, where = take_buffers_away(machine, Feature.MISSING_SHMEM | Feature.THREAD_ID)
    machine.resume()
    _, source = fault_of_the_drive(machine, watcher, content, where)
    registers = machine._drive
    resetting = threading.Thread(target=registers.write, args=(SLOT + STATUS, 4, 0))
    resetting.start()
    wait_until(lambda: is_inside(resetting, "between_requests"), 10, "the reset waits")
    assert registers.read(SLOT + STATUS, 4) == DRIVER_OK  # other accesses are answered
    assert machine.read_memory(0x10010, 4) == b"disk"
    assert resetting.is_alive()
    bring_the_rest(watcher, source, where)
    resetting.join(10)
    assert not resetting.is_alive()
    assert registers.read(SLOT + STATUS, 4) == 0


def test_a_page_of_a_request_that_is_lost_ends_the_guest(tmp_path):
    need("kvm")
    path = make_disk(tmp_path / "disk")
    assert in_child(lambda: touch_a_lost_page(path)) == 0


def touch_a_lost_page(path):
    machine, _ = working_guest(path)
    features = Feature.MISSING_SHMEM | Feature.THREAD_ID | Feature.POISON
    watcher, content, where = take_buffers_away(machine, features)
    machine.resume()
    page, _ = fault_of_the_drive(machine, watcher, content, where)
    watcher.poison(page, PAGE)
    wait_until(lambda: machine.run_state is RunState.INTERNAL_ERROR, 15)
    assert "a request to the drive touches a page that is lost" in str(machine.failure)
    machine.stop()
