"""Mappings: reading and writing, and doing so while a thread of the same process is the pager."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
from watched import PAGE, in_child, memory_of, watched

from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping

KINDS = pytest.mark.parametrize("kind", ["anonymous", "memfd"])


@KINDS
@pytest.mark.parametrize(
    "data", [b"bytes", bytearray(b"bytes"), memoryview(b"bytes"), np.frombuffer(b"bytes", np.uint8)]
)
def test_what_is_written_is_read(kind, data):
    with memory_of(kind, 2) as memory:
        memory.write(PAGE - 2, data)
        assert memory.read(PAGE - 3, 7) == b"\0bytes\0"
        memory.write(0, data[:0])
        assert memory.read(2 * PAGE, 0) == b""


@pytest.mark.parametrize("length", [2, 4, 8])
def test_a_number_is_written_and_read(length):
    with memory_of("memfd", 1) as memory:
        memory.store(16, 0x1122334455667788 >> 8 * (8 - length), length)
        assert memory.read(16, 8) == (0x1122334455667788 >> 8 * (8 - length)).to_bytes(8, "little")
        assert memory.load(16, length) == 0x1122334455667788 >> 8 * (8 - length)
        with pytest.raises(ValueError, match="is not inside"):
            memory.load(PAGE - 1, length)
        with pytest.raises(ValueError, match="is not inside"):
            memory.store(PAGE - 1, 0, length)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, PAGE + 1), (PAGE, 1), (0, -1)])
def test_ranges_outside_are_refused(offset, length):
    with memory_of("anonymous", 1) as memory, pytest.raises(ValueError, match="is not inside"):
        memory.read(offset, length)
    with memory_of("anonymous", 1) as memory, pytest.raises(ValueError, match="is not inside"):
        memory.write(PAGE - 1, b"ab")


def test_two_mappings_of_a_file_are_one_memory():
    fd = memfd.create("shared", 4 * PAGE)
    with Mapping.shared(fd, 4 * PAGE) as whole, Mapping.shared(fd, PAGE, 2 * PAGE) as part:
        os.close(fd)
        whole.write(2 * PAGE, b"seen")
        assert part.read(0, 4) == b"seen"
        part.view()[:4] = ord("x")
        assert whole.read(2 * PAGE, 4) == b"xxxx"


def test_a_read_only_mapping_reads():
    fd = memfd.create("readonly", PAGE)
    os.pwrite(fd, b"text", 0)
    with Mapping.shared(fd, PAGE, writable=False) as memory:
        assert memory.read(0, 4) == b"text"
    os.close(fd)


def serve(act, write: bool) -> None:
    """The whole trap in one process: a thread touches a missing page, this thread is the pager."""
    with watched() as w:
        toucher = w.write_in_thread(2, b"mine") if write else w.read_in_thread(2)
        fault = w.event()
        w.watcher.copy(fault.address, w.source(2), PAGE)
        act(w, toucher.done())


@pytest.mark.userfaultfd
def test_a_thread_of_the_same_process_can_serve_a_read():
    def check(_, result):
        assert result == b"\3\3\3\3"

    assert in_child(lambda: serve(check, write=False)) == 0


@pytest.mark.userfaultfd
def test_a_thread_of_the_same_process_can_serve_a_write():
    def check(w, _):
        assert w.memory.read(2 * PAGE, 5) == b"mine\3"

    assert in_child(lambda: serve(check, write=True)) == 0


@pytest.mark.userfaultfd
def test_a_read_over_many_missing_pages_is_served_page_by_page():
    def run() -> None:
        with watched() as w:
            toucher = w.read_in_thread(0, 8 * PAGE)
            for page in range(8):
                assert w.event().address == w.at(page)
                w.watcher.copy(w.at(page), w.source(page), PAGE)
            assert toucher.done() == w.content.read(0, 8 * PAGE)

    assert in_child(run) == 0


@KINDS
def test_resident_pages_are_those_touched(kind):
    with memory_of(kind, 4) as memory:
        memory.write(2 * PAGE, b"x")
        assert memory.resident().tolist() == [False, False, True, False]
        memory.populate(0, PAGE)
        assert memory.resident().tolist() == [True, False, True, False]


def test_populating_keeps_what_is_there():
    with memory_of("memfd", 2) as memory:
        memory.write(0, b"kept")
        memory.populate(0, 2 * PAGE)
        assert memory.read(0, 4) == b"kept"


@pytest.mark.userfaultfd
def test_populating_watched_memory_waits_for_the_pager():
    def run() -> None:
        with watched() as w:
            toucher = w.touch(lambda: w.memory.populate(0, PAGE))
            assert w.event().address == w.at(0)
            w.watcher.copy(w.at(0), w.source(0), PAGE)
            toucher.done()
            assert w.memory.read(0, 1) == b"\1"

    assert in_child(run) == 0


def test_discarding_empties_anonymous_memory_only():
    for kind, left in (("anonymous", bytes(4)), ("memfd", b"here")):
        with memory_of(kind, 1) as memory:
            memory.write(0, b"here")
            memory.discard(0, PAGE)
            assert memory.read(0, 4) == left


def mapped(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = (line.split()[0].split("-") for line in lines)
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


def test_a_closed_mapping_refuses_everything_and_closes_again():
    memory = memory_of("anonymous", 1)
    memory.close()
    memory.close()
    for use in (memory.view, memory.resident, lambda: memory.read(0, 1)):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_view_keeps_the_memory_until_it_is_gone():
    memory = memory_of("memfd", 300)  # large enough for the kernel not to reuse the hole
    memory.write(0, b"view")
    view, other = memory.view(), memory.view()
    address = memory.address
    part = view[:4]
    memory.close()
    assert mapped(address)
    del view, other
    gc.collect()
    assert part.tobytes() == b"view"
    del part
    gc.collect()
    assert not mapped(address)
