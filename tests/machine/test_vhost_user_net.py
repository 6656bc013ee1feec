"""The machine as front end of a network device: DPDK's testpmd, which sends each frame back."""

import contextlib
import mmap
import os

import pytest

from fakes.testpmd import Testpmd
from fakes.vhost_front_end import WRITE, Ring
from fakes.waiting import wait_until
from machine.drives import make_disk
from machine.machines import config_for, need, wait_for_work
from machine.networks import check_net, frames, net_workload
from postcopy.errors import GuestError, Refused
from postcopy.machine import oracle
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine


@contextlib.contextmanager
def running(back_end, accelerator="kvm", vcpus=1):
    need(accelerator)
    workload = net_workload(accelerator, vcpus)
    with Machine(config_for(workload, accelerator, vhost_user_net=str(back_end.path))) as machine:
        machine.start()
        wait_for_work(machine, workload)
        yield machine, workload


def wait_for_frames(machine, workload):
    """Until some more have come back."""
    before = frames(machine.read_memory, workload)

    def have_come() -> bool:
        assert machine.failure is None, machine.failure
        return frames(machine.read_memory, workload) > before + 9

    wait_until(have_come, 20, "frames come back")


@pytest.fixture
def testpmd(tmp_path):
    with Testpmd(tmp_path, "--no-mlockall", "--auto-start") as made:
        yield made


@pytest.mark.parametrize(("accelerator", "vcpus"), [("kvm", 2), ("unicorn", 1)])
def test_whenever_it_stands_still_the_frames_and_the_memory_are_right(testpmd, accelerator, vcpus):
    with running(testpmd, accelerator, vcpus) as (machine, workload):
        for _ in range(3):
            wait_for_frames(machine, workload)
            machine.pause()
            found = oracle.verify(machine.read_memory, workload)
            assert found.ok, found
            check_net(machine.read_memory, workload)
            states = machine.save_devices()
            machine.resume()
        (section,) = [each for each in states if "virtio" in each.name]
        assert (section.name, section.version) == ("virtio-mmio@00000000feb00e00/virtio-net", 11)


def test_the_guest_goes_on_with_the_next_back_end(tmp_path):
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Testpmd(tmp_path, "--no-mlockall", "--auto-start"))
        machine, workload = stack.enter_context(running(first))
        wait_for_frames(machine, workload)
        first.process.kill()
        first.process.wait()
        wait_until(lambda: not machine.shared_with(), 10, "it has ended")
        first.path.unlink()
        os.truncate(first.path.with_suffix(".output"), 0)
        stack.enter_context(Testpmd(tmp_path, "--no-mlockall", "--auto-start"))
        wait_for_frames(machine, workload)
        machine.pause()
        check_net(machine.read_memory, workload)


def test_a_guest_is_stopped_while_no_frame_is_taken(tmp_path):
    """What it has still to send stays in its ring."""
    with Testpmd(tmp_path, "--no-mlockall") as testpmd:
        need("kvm")
        workload = net_workload()
        with Machine(config_for(workload, "kvm", vhost_user_net=str(testpmd.path))) as machine:
            machine.start()
            wait_until(
                lambda: machine.read_memory(workload.device_area + 0x1082, 1) == b"\1", 20, "sent"
            )
            machine.pause()
            states = machine.save_devices()
            machine.resume()
            assert states
            testpmd.start()
            wait_for_work(machine, workload)
            wait_for_frames(machine, workload)
            machine.pause()
            check_net(machine.read_memory, workload)


def test_other_devices_are_refused(tmp_path, testpmd):
    disk = make_disk(tmp_path / "disk")
    with Machine(MachineConfig(32 << 20, vhost_user_net=str(testpmd.path))) as machine:
        machine.start(incoming=True)
        with Machine(MachineConfig(32 << 20, drive=disk)) as other:
            machine.pause()
            other.pause()
            states = machine.save_devices()
            with pytest.raises(
                GuestError, match="is a virtio-net, this machine's a virtio-blk; give"
            ):
                other.way_back(states)
        with (
            Machine(MachineConfig(32 << 20)) as other,
            pytest.raises(GuestError, match="the guest has a network device, this machine none"),
        ):
            other.way_back(states)


def test_what_cannot_be_a_network_device_is_refused(tmp_path):
    disk = make_disk(tmp_path / "disk")
    with pytest.raises(
        Refused, match="one virtio device; give one of --drive and --vhost-user-net"
    ):
        Machine(MachineConfig(32 << 20, vhost_user_net=str(tmp_path), drive=disk))
    with pytest.raises(Refused, match="no vhost-user back end at"):
        Machine(MachineConfig(32 << 20, vhost_user_net=str(tmp_path / "none")))


class Driver:
    """A driver of the tests' own, at the registers of a machine that stands still."""

    def __init__(self, machine):
        (region,) = machine.regions()
        self.bytes = mmap.mmap(region.fd, region.size_bytes)
        self.mmio = machine._drive
        self.receive, self.send = self.rings = [Ring(self, at=at) for at in (0x10000, 0x20000)]

    def guest(self, offset):
        return offset

    def get(self, register, size=4):
        return self.mmio.read(7 * 0x200 + register, size)

    def put(self, register, value):
        self.mmio.write(7 * 0x200 + register, 4, value)

    def agree(self):
        for register, value in ((0x70, 0), (0x70, 3), (0x24, 0), (0x20, 1 << 5), (0x24, 1)):
            self.put(register, value)
        self.put(0x20, 1)
        self.put(0x70, 11)
        assert self.get(0x70) == 11

    def make_ready(self, number):
        ring = self.rings[number]
        self.put(0x30, number)
        self.put(0x38, ring.size)
        places = (ring.descriptors, ring.available, ring.used)
        for register, address in zip((0x80, 0x90, 0xA0), places, strict=True):
            self.put(register, address)
        self.put(0x44, 1)

    def exchange(self, text):
        """A frame goes and comes back."""
        frame = bytes(12) + b"\xff" * 6 + b"RT\0\0\0\1" + b"\x88\xb5" + text * 50
        self.bytes[0x100000 : 0x100000 + len(frame)] = frame
        self.receive.put((0x200000, 2048, WRITE))
        self.send.put((0x100000, len(frame), 0))
        self.put(0x50, 0)
        self.put(0x50, 1)
        used = self.receive.index
        wait_until(lambda: self.receive.used_index() == used, 20, "the frame has come back")
        assert self.bytes[0x20000C : 0x200000 + len(frame)] == frame[12:]

    def forget(self):
        for ring in self.rings:
            ring.index = 0
            for at in (ring.available, ring.used):
                self.bytes[at + 2 : at + 4] = bytes(2)


@pytest.fixture
def driver(testpmd):
    with Machine(MachineConfig(32 << 20, vhost_user_net=str(testpmd.path))) as machine:
        machine._drive.runner.want()
        yield Driver(machine)


def test_what_a_driver_finds(driver):
    assert driver.get(0x08) == 1
    assert bytes(driver.get(0x100 + at, 1) for at in range(7)) == b"RT\0\x12\x34\x56\0"
    found = []
    for number in range(3):
        driver.put(0x30, number)
        found.append(driver.get(0x34))
    assert found == [256, 256, 0]
    features = []
    for half in range(2):
        driver.put(0x14, half)
        features.append(driver.get(0x10))
    assert features == [1 << 5 | 1 << 28 | 1 << 29, 1]


def test_a_driver_resets_the_device(driver):
    for text in (b"one", b"other"):
        driver.agree()
        driver.make_ready(0)
        driver.make_ready(1)
        driver.put(0x70, 15)
        driver.exchange(text)
        driver.exchange(text * 2)
        driver.put(0x70, 0)
        assert [ring.used_index() for ring in driver.rings] == [2, 2]
        driver.forget()


def test_the_device_begins_when_both_rings_are_ready(driver):
    driver.agree()
    driver.make_ready(0)
    driver.put(0x70, 15)
    assert driver.mmio.save().rings[0].entries == driver.receive.size
    assert not driver.mmio.runner._served
    driver.make_ready(1)
    driver.exchange(b"frame")
    state = driver.mmio.save()
    assert [ring.next_available for ring in state.rings] == [1, 1]
    assert [queue.ready for queue in state.queues] == [True, True]


def test_a_ring_outside_the_memory(driver):
    driver.agree()
    driver.make_ready(0)
    driver.make_ready(1)
    driver.put(0xA4, 1)
    driver.put(0x44, 1)
    driver.put(0x70, 15)
    wait_until(lambda: driver.get(0x70) == 15 | 64, 10, "the device needs a reset")
    driver.agree()
    driver.make_ready(0)
    driver.make_ready(1)
    driver.put(0xA4, 0)
    driver.put(0x44, 1)
    driver.put(0x70, 15)
    driver.exchange(b"frame")
