"""Pages that arrive in any order, more than once, on several threads, make one image with its digests."""

import json
import os
import random
import threading

import numpy as np
import pytest

from postcopy.channel.whole_file import WholeFile
from postcopy.errors import StreamError
from postcopy.image.digests import take_digests
from postcopy.image.file import ImageFile
from postcopy.image.formats import open_image
from postcopy.receive import running_digests
from postcopy.receive.page_file import PageFile
from postcopy.stream.records import (
    BlockEntry,
    Configuration,
    DeviceSection,
    Pages,
    RamSetup,
    XbzrlePage,
    ZeroPages,
)

PAGE = 4096
BLOCKS = {"ram": 500, "rom": 1, "small": 30}
SETUP = RamSetup(5, tuple(BlockEntry(name, pages * PAGE) for name, pages in BLOCKS.items()))
DEVICES = (DeviceSection(7, "cpu", 0, 12, b"registers"), DeviceSection(0, "timer", 1, 2, b""))
DESCRIPTION = json.dumps(
    {
        "devices": [
            {
                "name": each.name,
                "instance_id": each.instance,
                "fields": [{"name": "data", "size": len(each.payload)}],
            }
            for each in DEVICES
        ]
    }
)


class Scene:
    """A file in the making, and what must come of it."""

    def __init__(self, folder):
        self.path = folder / "image"
        self.file = WholeFile(self.path)
        self.pages = PageFile(self.file, Configuration("microvm", uuid=b"u" * 16), SETUP)
        self.memory = {name: np.zeros((n, PAGE), np.uint8) for name, n in BLOCKS.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pages.close()
        self.file.close()

    def write(self, block, numbers, rows):
        self.memory[block][numbers] = rows
        offsets = np.array(numbers, np.uint64) * np.uint64(PAGE)
        neighbours = bool((np.diff(numbers) == 1).all())
        self.pages.write(Pages(block, offsets, rows, neighbours))

    def clear(self, block, numbers):
        self.memory[block][numbers] = 0
        self.pages.clear(ZeroPages(block, np.array(numbers, np.uint64) * np.uint64(PAGE)))

    def finish(self):
        return self.pages.finish(DEVICES, DESCRIPTION)

    def check(self):
        """Finish it, and compare everything."""
        self.check_written(self.finish())

    def check_written(self, written):
        with open_image(self.file.partial) as image:
            assert (image.machine_name, image.uuid) == ("microvm", b"u" * 16)
            assert (tuple(image.sections), image.description) == (DEVICES, DESCRIPTION)
            assert image.ram_section_id == 5
            for name, rows in self.memory.items():
                np.testing.assert_array_equal(image.read(name, 0, len(rows)), rows)
                np.testing.assert_array_equal(image.has_data(name), rows.any(axis=1))
        data = sum(int(rows.any(axis=1).sum()) for rows in self.memory.values()) * PAGE
        assert written.data_bytes == data
        with ImageFile(self.file.partial) as file:
            found = take_digests(file)
        assert written.digests.size_bytes == found.size_bytes
        np.testing.assert_array_equal(written.digests.present, found.present)
        assert written.digests.text == found.text


@pytest.fixture
def scene(tmp_path):
    with Scene(tmp_path) as made:
        yield made


def rows_of(chance, count):
    rows = np.frombuffer(chance.randbytes(count * PAGE), np.uint8).reshape(count, PAGE).copy()
    rows[[each for each in range(count) if chance.random() < 0.1]] = 0
    return rows


def strided(rows):
    """As the records of a main channel lie: a word before each page."""
    room = np.empty((len(rows), PAGE + 8), np.uint8)
    room[:, 8:] = rows
    return room[:, 8:]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_order(scene, seed):
    chance = random.Random(seed)
    if seed % 2:  # the usual way: once, in order
        at = 0
        while at < 500:
            count = min(chance.randint(1, 256), 500 - at)
            scene.write("ram", list(range(at, at + count)), strided(rows_of(chance, count)))
            at += count
    for _ in range(40):
        block = chance.choice(list(BLOCKS))
        count = chance.randint(1, min(60, BLOCKS[block]))
        first = chance.randint(0, BLOCKS[block] - count)
        numbers = list(range(first, first + count))
        if chance.random() < 0.4:
            numbers = chance.sample(range(BLOCKS[block]), count)
        if chance.random() < 0.2:
            scene.clear(block, numbers)
        else:
            scene.write(block, numbers, strided(rows_of(chance, count)))
    scene.check()


def test_the_last_of_two_copies_in_one_packet_counts(scene):
    rows = rows_of(random.Random(1), 4) | 1
    rows[3] = 0
    scene.pages.write(Pages("ram", np.array([5, 6, 5, 6], np.uint64) * np.uint64(PAGE), rows))
    scene.memory["ram"][5] = rows[2]
    scene.check()


def test_digests_are_taken_while_pages_arrive(scene, monkeypatch):
    looked = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: looked.append(given) or real(*given))
    chance = random.Random(2)
    at = 0
    for count in (7, 16, 100, 3, 250, 100):  # no chunk is whole in one of them, nor aligned
        scene.write("ram", list(range(at, at + count)), rows_of(chance, count) | 1)
        at += count
    scene.pages._digests.close()
    looked.clear()
    written = scene.finish()
    # The heads and bitmaps of the blocks, what is behind them, and the last pages.
    assert len(looked) <= 2 + 2 * len(BLOCKS)
    scene.check_written(written)


def test_what_has_been_left_alone_is_read_while_more_arrives(scene, monkeypatch):
    chance = random.Random(3)
    taken = threading.Semaphore(0)
    real = running_digests.RunningDigests._take

    def take(self, chunk):
        real(self, chunk)
        taken.release()

    monkeypatch.setattr(running_digests.RunningDigests, "_take", take)
    for first in range(0, 480, 16):
        scene.write("ram", [first + 3], rows_of(chance, 1) | 1)
    for _ in range(30):
        assert taken.acquire(timeout=20)
    scene.write("ram", [3], rows_of(chance, 1) | 1)  # a digest that is old again
    scene.check()


def test_writers_on_several_threads(scene):
    def work(number):
        chance = random.Random(number)
        for _ in range(60):
            first = chance.randrange(0, 460, 4) + number
            scene.write(
                "ram", list(range(first, 500, 4))[:6], rows_of(chance, 6)[: (503 - first) // 4]
            )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scene.check()


def test_deltas(scene):
    rows = rows_of(random.Random(4), 1) | 1
    scene.write("ram", [9], rows)
    delta = bytes((0, 3)) + b"abc"
    scene.pages.change(XbzrlePage("ram", 9 * PAGE, delta, 0))
    scene.pages.change(XbzrlePage("ram", 10 * PAGE, delta, 0))  # of a page that was zero
    scene.pages.change(XbzrlePage("ram", 11 * PAGE, b"", 0))
    for page in (9, 10):
        scene.memory["ram"][page, :3] = np.frombuffer(b"abc", np.uint8)
    scene.write("ram", [12], np.eye(1, PAGE, dtype=np.uint8))
    scene.pages.change(XbzrlePage("ram", 12 * PAGE, bytes((0, 1, 0)), 0))  # all zero now
    scene.memory["ram"][12] = 0
    scene.check()


def test_nothing_is_written_behind_the_end(scene):
    scene.pages.finish([], None)
    with pytest.raises(StreamError, match="behind the end of the memory"):
        scene.write("ram", [1], np.ones((1, PAGE), np.uint8))


def test_a_size_that_no_file_can_have(tmp_path):
    with WholeFile(tmp_path / "image") as file, pytest.raises(OSError, match="image"):
        PageFile(file, Configuration("microvm"), RamSetup(2, (BlockEntry("ram", 1 << 60),)))
