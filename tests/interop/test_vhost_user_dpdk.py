"""Our front end with DPDK's testpmd as back end, through a postcopy: what it asks for, and what it gets."""

import contextlib
import os
import select
import struct
import threading

import pytest

from fakes.guest import RAM, FakeGuest
from fakes.testpmd import Testpmd
from fakes.uffd_events import read_events
from fakes.vhost_back_end import TIMEOUT_S
from fakes.vhost_front_end import PAGE, WRITE, Ram, Ring
from fakes.waiting import wait_until
from machine.machines import MIB
from postcopy.errors import GuestError, PageExists
from postcopy.guest import AddressSpace, MappedRange
from postcopy.kernel import memfd, processes
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.link.guest.keeper import GuestKeeper
from postcopy.vhost_user.back_end_process import BackEndProcess
from postcopy.vhost_user.front_end import FrontEnd, MemoryPart
from postcopy.vhost_user.messages import Request
from postcopy.vhost_user.payloads import RingAddresses, RingDescriptor, RingState
from postcopy.virtio.ring import Feature

pytestmark = pytest.mark.userfaultfd

MEMORY_BYTES = 4 * MIB
RECEIVED, SENT = 0x200000, 0x100000
HEADER_BYTES = 12


class Scene:
    """A guest's memory that is still to come, its keeper, and a testpmd."""

    def __init__(self, folder, *options):
        self.testpmd = Testpmd(folder, *options)
        self.guest = FakeGuest(MEMORY_BYTES)
        self.guest.owned = False
        (self.region,) = self.guest.regions()
        self.parts = [MemoryPart(RAM, 0, MEMORY_BYTES, 0, self.region.fd, 0)]
        self.keeper = GuestKeeper(self.guest, lambda _: None)

    def share(self):
        """The front end of the machine, and its process."""
        process = BackEndProcess(str(self.testpmd.path), self.parts, timeout_s=TIMEOUT_S)
        self.guest.sharing.append(process)
        return process

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.keeper.unwatch_missing()
        for process in self.guest.sharing:
            process.close()
        self.guest.close()
        self.testpmd.__exit__()


class NetDevice:
    """Testpmd as the keeper knows it; its rings are the test's."""

    name = "testpmd"

    def __init__(self, scene):
        self._scene = scene
        self.front_end = FrontEnd.connect(str(scene.testpmd.path), TIMEOUT_S)
        self.ended = threading.Event()

    def watch_missing(self):
        watch = self.front_end.advise()
        self.front_end.listen(self._scene.parts)
        pid = self.front_end.process_id
        (found,) = processes.mapped_parts(pid, self._scene.region.fd)
        return AddressSpace(pid, [MappedRange(RAM, 0, MEMORY_BYTES, found.address)], watch)

    def unwatch_missing(self):
        self.front_end.end()
        self.ended.set()

    def start_ring(self, number, ring, flags=0):
        do = self.front_end.do
        places = ring.descriptors, ring.used, ring.available, ring.used
        do(Request.SET_VRING_NUM, RingState(number, ring.size))
        do(Request.SET_VRING_BASE, RingState(number, 0))
        do(Request.SET_VRING_ADDR, RingAddresses(number, flags, *places))
        do(Request.SET_VRING_CALL, RingDescriptor(number), [ring.call])
        do(Request.SET_VRING_KICK, RingDescriptor(number), [ring.kick])
        do(Request.SET_VRING_ENABLE, RingState(number, 1))

    def close(self):
        self.front_end.close()


class Pager:
    """Brings each page that a process asks for out of the source's memory."""

    def __init__(self, space, source, fd):
        self._watch = Userfaultfd.from_fd(os.dup(space.userfaultfd))
        self._address = space.ranges[0].address
        self._source, self._fd = source, fd
        self._ended = os.eventfd(0)
        self.came = set()
        self._thread = threading.Thread(target=self._serve, name="pager")
        self._thread.start()

    def bring(self, offset):
        if offset not in self.came:
            self.came.add(offset)
            os.pwrite(self._fd, self._source.bytes[offset : offset + PAGE], offset)

    def close(self):
        os.eventfd_write(self._ended, 1)
        self._thread.join()
        self._watch.close()
        os.close(self._ended)

    def _serve(self):
        poll = select.poll()
        poll.register(self._watch, select.POLLIN)
        poll.register(self._ended, select.POLLIN)
        while all(fd != self._ended for fd, _ in poll.poll()):
            for fault in read_events(self._watch):
                offset = fault.address // PAGE * PAGE - self._address
                self.bring(offset)
                with contextlib.suppress(PageExists):
                    self._watch.map_existing(self._address + offset, PAGE)
                self._watch.wake(self._address + offset, PAGE)


def packet(number):
    return struct.pack(">6s6sH", b"\xff" * 6, b"RT\0\0\0\1", 0x0800) + bytes([65 + number]) * 86


class Source:
    """Memory with two packets that wait to be sent, and eight buffers to receive into."""

    def __init__(self):
        self.ram = Ram(MEMORY_BYTES)
        self.receive, self.send = self.rings = [Ring(self.ram, at=at) for at in (0x10000, 0x20000)]
        for number in range(2):
            at, data = SENT + 0x10000 * number, bytes(HEADER_BYTES) + packet(number)
            self.ram.bytes[at : at + len(data)] = data
            self.send.put((at, len(data), 0))
        for number in range(8):
            self.receive.put((RECEIVED + PAGE * number, 2048, WRITE))

    def check(self, fd):
        """Wait until the packets have come back, in the memory that this is the file of."""

        def used(ring):
            return int.from_bytes(os.pread(fd, 2, ring.used + 2), "little")

        wait_until(lambda: [used(ring) for ring in self.rings] == [2, 2], TIMEOUT_S, "two packets")
        for number in range(2):
            at, expected = RECEIVED + PAGE * number + HEADER_BYTES, packet(number)
            assert os.pread(fd, len(expected), at) == expected

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for ring in self.rings:
            ring.close()
        self.ram.close()


def test_it_agrees_on_what_a_postcopy_needs_and_registers_its_memory(tmp_path):
    with Scene(tmp_path, "--no-mlockall") as scene:
        process = scene.share()
        assert process.features >> 26 & 1, "LOG_ALL"
        assert process.logs_writes
        scene.keeper.page_maps()
        _, space = scene.keeper.watch_missing()
        assert sum(part.length_bytes for part in space.ranges) == MEMORY_BYTES
        assert os.fstat(scene.region.fd).st_blocks == 0
        os.kill(space.process_id, 0)


def test_one_that_locks_its_memory_is_refused(tmp_path):
    """It has filled all of it with zeros, and would never ask for a page."""
    with Scene(tmp_path) as scene:
        scene.keeper.page_maps()
        scene.share()
        with pytest.raises(GuestError, match=r"has mapped 1024 pages .* --no-mlockall"):
            scene.keeper.watch_missing()


def test_it_is_no_disk(tmp_path):
    """A disk needs its configuration."""
    with (
        Scene(tmp_path, "--no-mlockall") as scene,
        pytest.raises(GuestError, match="CONFIG is required, and not offered"),
    ):
        scene.share().configuration(8)


def test_packets_of_a_guest_that_has_just_come_are_sent_and_received(tmp_path):
    """Its rings, packets and buffers are missing: it asks for each, and waits."""
    with Source() as source, Scene(tmp_path, "--no-mlockall") as scene:
        device = NetDevice(scene)
        scene.guest.sharing.append(device)
        device.front_end.set_features(Feature.VERSION_1, log=False)
        scene.keeper.page_maps()
        _, space = scene.keeper.watch_missing()
        pager = Pager(space, source.ram, scene.region.fd)
        for number, ring in enumerate(source.rings):
            device.start_ring(number, ring)
        scene.testpmd.start()
        source.check(scene.region.fd)
        assert {SENT, SENT + 0x10000, RECEIVED, RECEIVED + PAGE} <= pager.came
        for offset in range(0, MEMORY_BYTES, PAGE):
            pager.bring(offset)
        pager.close()
        scene.keeper.unwatch_missing()
        assert device.ended.wait(TIMEOUT_S)


def test_what_it_writes_is_in_the_dirty_log(tmp_path):
    """And nothing else is: the packets that it has read are not."""
    with Source() as source, Scene(tmp_path, "--no-mlockall") as scene:
        os.pwrite(scene.region.fd, source.ram.bytes, 0)
        device = NetDevice(scene)
        scene.guest.sharing.append(device)
        log = memfd.create("log", PAGE)
        device.front_end.set_memory(scene.parts)
        device.front_end.set_log(log, PAGE)
        device.front_end.set_features(Feature.VERSION_1, log=True)
        for number, ring in enumerate(source.rings):
            device.start_ring(number, ring, RingAddresses.LOGGED)
        scene.testpmd.start()
        source.check(scene.region.fd)
        written = {RECEIVED, RECEIVED + PAGE, *(ring.used for ring in source.rings)}

        def logged():
            bits = int.from_bytes(os.pread(log, PAGE, 0), "little")
            return {PAGE * page for page in range(MEMORY_BYTES // PAGE) if bits >> page & 1}

        wait_until(lambda: logged() == written, TIMEOUT_S, lambda: f"{logged()} are in the log")
        os.close(log)
