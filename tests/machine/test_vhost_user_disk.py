"""The machine as front end of a vhost-user disk: our back end's, and qemu-storage-daemon's."""

import contextlib
import mmap
import select
import signal
from pathlib import Path

import pytest

from fakes.uffd_events import read_events
from fakes.vhost_back_end import BackEnd, StorageDaemon
from fakes.vhost_front_end import IN, OUT, BlockDriver, Ring
from fakes.waiting import wait_until
from kernel.watched import PAGE
from machine.drives import DISK_BYTES, check_disk, disk_workload, make_disk, writes_and_reads
from machine.machines import MIB, config_for, need, wait_for_work
from postcopy.errors import GuestError, Refused
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.machine import oracle
from postcopy.machine.back_ends import disk_bytes
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine
from postcopy.machine.memory_blocks import MemoryBlock

BACK_ENDS = pytest.mark.parametrize("kind", [BackEnd, StorageDaemon], ids=["ours", "qemu"])


@pytest.fixture
def disk(tmp_path):
    return make_disk(tmp_path / "disk")


@contextlib.contextmanager
def running(back_end, accelerator="kvm", vcpus=1, **more):
    need(accelerator)
    workload = disk_workload(accelerator, vcpus, **more)
    with Machine(config_for(workload, accelerator, vhost_user_blk=str(back_end.path))) as machine:
        machine.start()
        wait_for_work(machine, workload)
        yield machine, workload


def wait_for_requests(machine, workload):
    """Until the guest has written to its disk, and read from it, once more."""
    before = writes_and_reads(machine.read_memory, workload)

    def used() -> bool:
        assert machine.failure is None, machine.failure
        now = writes_and_reads(machine.read_memory, workload)
        return all(a > b for a, b in zip(now, before, strict=True))

    wait_until(used, 20, "the guest does not use its disk")


def check(machine, workload, disk):
    found = oracle.verify(machine.read_memory, workload)
    assert found.ok, found
    check_disk(machine.read_memory, workload, disk)


@BACK_ENDS
@pytest.mark.parametrize(("accelerator", "vcpus"), [("kvm", 2), ("unicorn", 1)])
def test_whenever_it_stands_still_the_disk_and_the_memory_are_right(
    tmp_path, disk, kind, accelerator, vcpus
):
    with (
        kind(tmp_path / "back_end", disk) as back_end,
        running(back_end, accelerator, vcpus) as (machine, workload),
    ):
        for _ in range(3):
            wait_for_requests(machine, workload)
            machine.pause()
            check(machine, workload, disk)
            states = machine.save_devices()
            machine.resume()
        (section,) = [each for each in states if "virtio" in each.name]
        assert (section.name, section.version, len(section.payload)) == (
            "virtio-mmio@00000000feb00e00/vhost-user-blk",
            1,
            48386,
        )
    assert back_end.said == ""


def test_above_the_hole(tmp_path, disk):
    with (
        BackEnd(tmp_path / "back_end", disk) as back_end,
        running(back_end, fill_bytes=MIB, memory_bytes=5 << 30) as (machine, workload),
    ):
        machine.stop()
        check(machine, workload, disk)


@BACK_ENDS
def test_the_guest_goes_on_with_the_next_back_end(tmp_path, disk, kind):
    folder = tmp_path / "back_end"
    with contextlib.ExitStack() as stack:
        back_end = stack.enter_context(kind(folder, disk))
        machine, workload = stack.enter_context(running(back_end))
        for number in (signal.SIGKILL, signal.SIGTERM):
            wait_for_requests(machine, workload)
            (process,) = machine.shared_with()
            back_end.end(number)
            wait_until(lambda: not machine.shared_with(), 10, "it has ended")
            back_end.path.unlink(missing_ok=True)
            back_end = stack.enter_context(kind(folder, disk))
            wait_for_requests(machine, workload)
            assert machine.shared_with()[0].name != process.name
        machine.stop()
        check(machine, workload, disk)


def test_a_guest_whose_back_end_has_ended_can_be_stopped(tmp_path, disk):
    with (
        BackEnd(tmp_path / "back_end", disk) as back_end,
        running(back_end) as (machine, workload),
    ):
        back_end.end(signal.SIGKILL)
        machine.pause()
        machine.save_devices()
        machine.resume()
        with BackEnd(tmp_path / "back_end", disk):
            wait_for_requests(machine, workload)
            machine.pause()
            check(machine, workload, disk)


def test_another_disk_is_not_taken_in_place_of_the_guests(tmp_path, disk, caplog):
    folder = tmp_path / "back_end"
    with BackEnd(folder, disk) as back_end, running(back_end) as (machine, workload):
        back_end.end(signal.SIGKILL)
        other = make_disk(tmp_path / "other", 2 * DISK_BYTES)
        with BackEnd(folder, other):
            wait_until(lambda: "give both sides the same disk" in caplog.text, 20, "it is refused")
        with BackEnd(folder, disk):
            wait_for_requests(machine, workload)
            machine.pause()
            check(machine, workload, disk)


class Driver:
    """A driver of the tests' own, at the registers of a machine that stands still."""

    def __init__(self, machine):
        (region,) = machine.regions()
        self.bytes = mmap.mmap(region.fd, region.size_bytes)
        self.mmio = machine._drive
        self.ring = Ring(self)
        self.requests = BlockDriver(self.ring)

    def guest(self, offset):
        return offset

    def put(self, register, value):
        self.mmio.write(7 * 0x200 + register, 4, value)

    def begin(self):
        for register, value in (
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x70, 11),
            (0x38, self.ring.size),
        ):
            self.put(register, value)
        places = (self.ring.descriptors, self.ring.available, self.ring.used)
        for register, address in zip((0x80, 0x90, 0xA0), places, strict=True):
            self.put(register, address)
        self.put(0x44, 1)
        self.put(0x70, 15)


@pytest.fixture
def driver(tmp_path, disk):
    with (
        BackEnd(tmp_path / "back_end", disk) as back_end,
        Machine(MachineConfig(32 * MIB, vhost_user_blk=str(back_end.path))) as machine,
    ):
        driver = Driver(machine)
        driver.begin()
        machine._drive.runner.want()
        driver.requests.submit(OUT, 2, bytes(512), kick=False)
        driver.put(0x50, 0)
        wait_until(lambda: driver.ring.used_index() == 1, 10, "the first request")
        yield driver


def test_a_request_whose_kick_has_not_come_before_a_stop_is_done_before_it(driver, disk):
    runner = driver.mmio.runner
    slot = driver.requests.submit(OUT, 0, b"x" * 512, kick=False)
    runner.unwant()
    assert runner.wait_parked(10)
    assert driver.ring.used_index() == 2
    assert driver.requests.status(slot) == 0
    assert Path(disk).read_bytes()[:513] == b"x" * 512 + b"\0"


def test_a_driver_resets_the_device_while_a_request_is_there(driver):
    driver.requests.submit(OUT, 0, b"x" * 512, kick=False)
    driver.put(0x70, 0)
    assert driver.ring.used_index() == 2
    driver.bytes[driver.ring.available + 2 : driver.ring.available + 4] = bytes(2)
    driver.bytes[driver.ring.used + 2 : driver.ring.used + 4] = bytes(2)
    driver.ring.index = 0
    driver.begin()
    driver.requests.submit(OUT, 1, b"y" * 512, kick=False)
    driver.put(0x50, 0)
    wait_until(lambda: driver.ring.used_index() == 1, 10, "the request after the reset")


def missing(process):
    """Have the back end wait for pages; return its userfaultfd, and where its memory begins."""
    space = process.watch_missing()
    (part,) = space.ranges
    return Userfaultfd.from_fd(space.userfaultfd), part.address


def small_pages(back_end):
    return MachineConfig(32 * MIB, vhost_user_blk=str(back_end.path), transparent_huge_pages=False)


def waits_at(watcher):
    """The page that the back end waits for."""
    assert select.select([watcher], [], [], 10)[0]
    (event,) = read_events(watcher)
    return event.address & -PAGE


@pytest.mark.userfaultfd
@BACK_ENDS
def test_a_back_end_that_waits_for_a_page_holds_nothing_up(tmp_path, disk, kind):
    with (
        kind(tmp_path / "back_end", disk) as back_end,
        Machine(small_pages(back_end)) as machine,
        Mapping.anonymous(PAGE) as source,
    ):
        (process,) = machine.shared_with()
        watcher, memory = missing(process)
        driver = Driver(machine)
        for at in (driver.ring.descriptors, driver.ring.available, driver.ring.used):
            driver.bytes[at] = 0  # it is there
        driver.begin()
        runner = driver.mmio.runner
        runner.want()
        slot = driver.requests.submit(IN, 0, length=512, kick=False)
        driver.put(0x50, 0)
        page = waits_at(watcher)
        assert page == memory + driver.requests.data_at(slot)
        runner.unwant()
        assert not runner.wait_parked(0.2)
        assert runner.awaits.startswith(f"{process.name}, which has requests in flight")
        watcher.copy(page, source.address, PAGE)
        assert runner.wait_parked(10)
        assert driver.requests.status(slot) == 0
        process.unwatch_missing()
        watcher.close()


@pytest.mark.userfaultfd
@BACK_ENDS
def test_a_machine_whose_back_end_waits_for_a_page_of_the_ring_is_closed(tmp_path, disk, kind):
    with (
        kind(tmp_path / "back_end", disk) as back_end,
        Machine(MachineConfig(32 * MIB, vhost_user_blk=str(back_end.path))) as machine,
    ):
        (process,) = machine.shared_with()
        watcher, memory = missing(process)
        driver = Driver(machine)
        driver.begin()
        driver.mmio.runner.want()
        assert waits_at(watcher) == memory + driver.ring.used
        driver.mmio.runner.unwant()
        assert not driver.mmio.runner.wait_parked(0.2)
        machine.run_control._park_timeout_s = 0.2
        machine.close()
        watcher.close()
        back_end.process.kill()


def test_a_ring_outside_the_memory_is_broken_before_the_back_end_sees_it(driver):
    driver.put(0x70, 0)
    driver.ring.used = 1 << 30
    driver.begin()
    wait_until(lambda: driver.mmio.read(7 * 0x200 + 0x70, 4) & 64, 10, "it needs a reset")


def states_of(machine):
    machine.pause()
    return machine.save_devices()


def test_a_machine_with_another_kind_of_drive_refuses_the_guest(tmp_path, disk):
    with BackEnd(tmp_path / "back_end", disk) as back_end, running(back_end) as (machine, _):
        states = states_of(machine)
    with Machine(MachineConfig(32 * MIB, accel="kvm", drive=disk)) as machine:
        machine.start(incoming=True)
        with pytest.raises(GuestError, match="a vhost-user-blk, this machine's a virtio-blk"):
            machine.load_devices(states)
    with Machine(MachineConfig(32 * MIB, accel="kvm")) as machine:
        machine.start(incoming=True)
        with pytest.raises(GuestError, match="start it with --vhost-user-blk SOCKET"):
            machine.load_devices(states)


def test_the_size_of_the_disk(tmp_path, disk):
    with BackEnd(tmp_path / "back_end", disk) as back_end:
        assert disk_bytes(str(back_end.path)) == DISK_BYTES


def refused(**more):
    with pytest.raises(Refused) as refusal:
        Machine(MachineConfig(32 * MIB, **more))
    return str(refusal.value)


def test_what_cannot_be_such_a_disk(tmp_path):
    path = str(tmp_path / "none")
    assert f"no vhost-user back end at {path}: No such file" in refused(vhost_user_blk=path)
    assert "has no place for a virtio device" in refused(vhost_user_blk=path, machine_type="none")
    assert "one of --drive and --vhost" in refused(vhost_user_blk=path, drive=path)
    blocks = tuple(MemoryBlock(f"b{n}", 2 * MIB) for n in range(16))
    assert "16 parts, and a vhost-user" in refused(vhost_user_blk=path, blocks=blocks)
