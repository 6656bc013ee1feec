"""Memory that is photographed while somebody writes to it."""

import os
import threading

import numpy as np
import pytest

from fakes.waiting import wait_until
from postcopy.abi.userfaultfd import RegisterMode
from postcopy.errors import HostCannot
from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import SNAPSHOT_FEATURES, Userfaultfd
from postcopy.memory.ram_block import RamBlock
from postcopy.snapshot.bitmap import PIECE_BYTES, SnapshotBitmap
from postcopy.snapshot.cow_buffer import CowBuffer
from postcopy.snapshot.write_protect import RUN_BYTES, WriteProtectHandler

PAGE = 4096
PAGES = 1024
RUN = RUN_BYTES // PAGE


class Owner:
    """A guest's process in small: memory of which each even page is filled with its number."""

    def __init__(self):
        self.fd = memfd.create("ram", PAGES * PAGE)
        self.mapping = Mapping.shared(self.fd, PAGES * PAGE)
        for page in range(0, PAGES, 2):
            self.write(page, page % 251 + 1)
        try:
            self.watch = Userfaultfd.open(SNAPSHOT_FEATURES)
        except HostCannot as error:
            pytest.skip(f"needs userfaultfd: {error}")
        self.watch.register(self.mapping.address, PAGES * PAGE, RegisterMode.WP)
        self.watched = True
        self.errors = []

    def block(self):
        return RamBlock(Region("ram", PAGES * PAGE, PAGE, 0, self.mapping.address, os.dup(self.fd)))

    def write(self, page, value):
        self.mapping.write(page * PAGE, bytes([value]) * PAGE)

    def memory(self):
        return np.frombuffer(os.pread(self.fd, PAGES * PAGE, 0), np.uint8).reshape(-1, PAGE)

    def let_all_go(self):
        """As the guest's process does it at the end."""
        self.watch.unregister(self.mapping.address, PAGES * PAGE)
        self.watch.wake(self.mapping.address, PAGES * PAGE)
        self.watched = False

    def close(self):
        if self.watched:
            self.let_all_go()
        self.watch.close()
        self.mapping.close()
        os.close(self.fd)


class Shot:
    """A handler over an owner's memory."""

    def __init__(self, owner, limit_bytes=32 << 20):
        self.owner = owner
        self.block = owner.block()
        self.unsaved = SnapshotBitmap([self.block])
        self.aside = CowBuffer(limit_bytes)
        watch = Userfaultfd.from_fd(os.dup(owner.watch.fd))
        self.handler = WriteProtectHandler(watch, self.unsaved, self.aside, owner.errors.append)
        self.handler.start()
        self.image = np.zeros((PAGES, PAGE), np.uint8)
        self.times = np.zeros(PAGES, int)

    def keep(self, copies):
        self.image[copies.data] = copies.contents
        self.times[copies.data] += 1
        self.times[copies.zeros] += 1

    def keep_aside(self):
        while (copies := self.aside.take()) is not None:
            self.keep(copies)
            self.aside.written(copies)

    def copy_rest(self):
        for copies in self.unsaved.copy_rest():
            self.handler.unprotect(copies.block, copies.first, copies.end)
            self.keep(copies)
            self.keep_aside()
        while (copies := self.aside.take_rest()) is not None:
            self.keep(copies)
            self.aside.written(copies)

    def close(self):
        self.handler.stop()
        self.block.close()


@pytest.fixture
def owner():
    made = Owner()
    yield made
    made.close()
    assert made.errors == []


@pytest.fixture
def shot(owner):
    made = Shot(owner)
    yield made
    made.close()


def check(shot, expected):
    """The image is right, and each page came into it once."""
    assert np.array_equal(shot.image, expected)
    assert (shot.times == 1).all()
    assert shot.unsaved.remaining_bytes == 0


def test_nobody_writes(owner, shot):
    before = owner.memory()
    shot.handler.arm()
    shot.handler.freeze()
    assert shot.unsaved.remaining_bytes == PAGES * PAGE
    shot.copy_rest()
    check(shot, before)
    assert shot.handler.stalls.count == 0


def test_holes_stay_holes(owner, shot):
    shot.handler.arm()
    shot.handler.freeze()
    shot.copy_rest()
    assert os.fstat(owner.fd).st_blocks * 512 == PAGES // 2 * PAGE


def test_writes_before_the_stop_are_in_the_picture(owner, shot):
    shot.handler.arm()
    for page in (0, 1, 500, 501, PAGES - 1):
        owner.write(page, 77)
    before = owner.memory()
    shot.handler.freeze()
    assert shot.aside.take() is None
    shot.copy_rest()
    check(shot, before)


def test_writes_after_the_stop_are_not(owner, shot):
    shot.handler.arm()
    owner.write(10, 99)  # once before, once after
    before = owner.memory()
    shot.handler.freeze()
    for page in (0, 1, 10, 500, 501, PAGES - 1):
        owner.write(page, 88)
    assert not shot.unsaved.is_unsaved(shot.block, 10)
    shot.copy_rest()
    check(shot, before)
    wait_until(lambda: shot.handler.stalls.count == 3, 10, "three runs, three stalls")
    assert shot.handler.stalls.figures().max_us > 0


def test_neighbours_come_along(owner, shot):
    shot.handler.arm()
    shot.handler.freeze()
    owner.write(RUN + 2, 5)
    copies = shot.aside.take_rest()
    assert (copies.first, copies.end) == (RUN, 2 * RUN)
    assert copies.data.tolist() == list(range(RUN, 2 * RUN, 2))
    assert copies.zeros.tolist() == list(range(RUN + 1, 2 * RUN, 2))


def test_a_write_to_a_page_that_was_saved_waits_for_nothing(owner, shot):
    before = owner.memory()
    shot.handler.arm()
    shot.handler.freeze()
    shot.copy_rest()
    for page in range(0, PAGES, 3):
        owner.write(page, 66)
    assert shot.handler.stalls.count == 0
    check(shot, before)


def test_writers_all_the_while(owner, shot):
    """Two threads write everywhere, from before the stop to after the end, but for the stop itself."""
    gate, stop, idle = threading.Event(), threading.Event(), threading.Semaphore(0)

    def work(seed):
        numbers = np.random.default_rng(seed)
        value = 0
        while not stop.is_set():
            if not gate.is_set():
                idle.release()
                gate.wait()
            value = value % 255 + 1
            owner.write(int(numbers.integers(PAGES)), value)

    gate.set()
    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    shot.handler.arm()
    gate.clear()
    for _ in threads:
        assert idle.acquire(timeout=10)
    before = owner.memory()
    shot.handler.freeze()
    gate.set()
    shot.copy_rest()
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    check(shot, before)
    assert not np.array_equal(owner.memory(), before)


def test_without_room_a_writer_waits_and_is_saved_by_the_sweep(owner):
    shot = Shot(owner, limit_bytes=2 * RUN_BYTES)
    shot.handler.arm()
    before = owner.memory()
    shot.handler.freeze()
    done = []

    def work():
        for page in range(0, PAGES, RUN):
            owner.write(page, 44)
            done.append(page)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    wait_until(lambda: shot.aside.most_bytes >= RUN_BYTES, 10, "copies")
    shot.copy_rest()
    thread.join(10)
    assert not thread.is_alive()
    check(shot, before)
    assert shot.aside.most_bytes <= 2 * RUN_BYTES
    shot.close()


def test_stopping_leaves_nobody_waiting(owner):
    """Once the guest's process has ended the registration."""
    shot = Shot(owner, limit_bytes=PAGE)
    shot.handler.arm()
    shot.handler.freeze()
    threads = [
        threading.Thread(target=owner.write, args=(page, 3), daemon=True) for page in (0, 100, 200)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: shot.aside.most_bytes, 10, "the first copy")
    shot.close()
    owner.let_all_go()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_fault_of_ours_is_told(owner):
    """Whoever waits must not wait for ever because of it."""
    shot = Shot(owner)
    shot.unsaved.find = lambda address: {}[address]
    shot.handler.arm()
    thread = threading.Thread(target=owner.write, args=(0, 3), daemon=True)
    thread.start()
    wait_until(lambda: owner.errors, 10, "the error")
    assert "fault handler failed" in str(owner.errors.pop())
    shot.close()
    owner.let_all_go()
    thread.join(10)
    assert not thread.is_alive()


def test_pieces_are_bounded(owner, shot):
    sizes = [len(copies.data) for copies in shot.unsaved.copy_rest()]
    assert max(sizes) * PAGE <= PIECE_BYTES
    assert sum(sizes) == PAGES // 2
