"""PAGEMAP_SCAN: exact, lossless while somebody writes, and from another process."""

import errno
import os
import socket
import threading

import numpy as np
import pytest
from watched import PAGE, Watched, in_child, watched

from postcopy.abi.pagemap import PageCategory
from postcopy.abi.userfaultfd import Feature, RegisterMode
from postcopy.errors import KernelError
from postcopy.kernel import calls, memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.pagemap import PagemapScanner

ASYNC = Feature.WP_ASYNC | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED
KINDS = pytest.mark.parametrize("kind", ["anonymous", "memfd"])


def tracked(kind: str = "memfd", pages: int = 64):
    return watched(kind, pages=pages, features=ASYNC, mode=RegisterMode.WP)


def scan(scanner: PagemapScanner, w: Watched, *, protect: bool = True) -> list[list[int]]:
    """The pages found, as [first, last) page numbers."""
    found = scanner.scan(w.memory.address, w.memory.address + w.memory.length, protect=protect)
    assert (found.dtype, found.shape[1:]) == (np.uint64, (2,))
    return ((found - np.uint64(w.memory.address)) // np.uint64(PAGE)).tolist()


@KINDS
def test_a_scan_finds_what_was_written_since_the_one_before(kind):
    with tracked(kind) as w, PagemapScanner(os.getpid()) as scanner:
        w.memory.write(0, bytes(64 * PAGE))
        assert scan(scanner, w) == [[0, 64]]
        assert scan(scanner, w) == []
        for page in (3, 4, 9, 63):
            w.memory.write(page * PAGE, b"x")
        assert scan(scanner, w, protect=False) == [[3, 5], [9, 10], [63, 64]]
        assert scan(scanner, w) == [[3, 5], [9, 10], [63, 64]]
        assert scan(scanner, w) == []


@KINDS
@pytest.mark.parametrize("capacity", [1, 2, 3, 1000])
def test_a_small_buffer_only_takes_more_calls(kind, capacity):
    with tracked(kind) as w, PagemapScanner(0, capacity=capacity) as scanner:
        w.memory.write(0, bytes(64 * PAGE))
        assert scan(scanner, w) == [[0, 64]]
        for page in range(0, 64, 2):
            w.memory.write(page * PAGE, b"x")
        assert scan(scanner, w) == [[page, page + 1] for page in range(0, 64, 2)]


def test_writes_through_another_mapping_are_not_seen():
    fd = memfd.create("two", PAGE)
    with tracked() as w, PagemapScanner(0) as scanner, Mapping.shared(fd, PAGE) as guest:
        w.watcher.register(guest.address, PAGE, RegisterMode.WP)
        with Mapping.shared(fd, PAGE) as other:
            guest.write(0, b"1")
            end = guest.address + PAGE
            assert scanner.scan(guest.address, end, protect=True).tolist() == [[guest.address, end]]
            other.write(0, b"2")
            os.pwrite(fd, b"3", 1)
            assert scanner.scan(guest.address, end, protect=True).size == 0
        assert guest.read(0, 2) == b"23"
    os.close(fd)


def test_present_pages_can_be_asked_for():
    with Mapping.anonymous(8 * PAGE) as memory, PagemapScanner(0) as scanner:
        memory.write(2 * PAGE, bytes(2 * PAGE + 1))
        start = memory.address
        found = scanner.scan(
            start, start + 8 * PAGE, protect=False, categories=PageCategory.PRESENT
        )
        assert found.tolist() == [[start + 2 * PAGE, start + 5 * PAGE]]


def write_rounds(w: Watched, written: np.ndarray, rounds: int) -> None:
    """Write a growing number to scattered pages, each write noted after it is done."""
    for number in range(1, rounds + 1):
        for page in range(number % 7, 64, 1 + number % 5):
            w.memory.write(page * PAGE, number.to_bytes(4, "little"))
            written[page] = number


@KINDS
def test_no_write_is_lost_while_a_thread_writes(kind):
    """Copy what each scan reports; at the end the copy must be the memory."""
    written = np.zeros(64, np.int64)
    with tracked(kind) as w, PagemapScanner(0) as scanner:
        w.memory.write(0, bytes(64 * PAGE))
        scan(scanner, w)
        copy = bytearray(64 * PAGE)
        writer = threading.Thread(target=write_rounds, args=(w, written, 150))
        writer.start()
        scans = 0
        while writer.is_alive():
            take(scanner, w, copy)
            scans += 1
        writer.join()
        take(scanner, w, copy)
        numbers = np.frombuffer(copy, "<u4")[:: PAGE // 4]
        assert scans > 1
        assert numbers.tolist() == written.tolist()
        assert bytes(copy) == w.memory.read(0, 64 * PAGE)


def take(scanner: PagemapScanner, w: Watched, copy: bytearray) -> None:
    for first, last in scan(scanner, w):
        size = (last - first) * PAGE
        copy[first * PAGE : last * PAGE] = w.memory.read(first * PAGE, size)


def test_another_process_can_scan():
    ours, theirs = socket.socketpair()
    with ours, theirs, tracked() as w, PagemapScanner(0) as own:
        w.memory.write(0, bytes(64 * PAGE))
        scan(own, w)
        w.memory.write(7 * PAGE, b"x")
        pid = os.getpid()

        def act() -> None:
            with PagemapScanner(pid) as scanner:
                assert scan(scanner, w) == [[7, 8]]

        assert in_child(act) == 0
        assert scan(own, w) == []  # the other process has protected it again


def test_ranges_that_are_not_tracked_are_refused_when_protecting():
    with Mapping.anonymous(PAGE) as memory, PagemapScanner(0) as scanner:
        memory.write(0, b"x")
        with pytest.raises(KernelError, match="feature WP_ASYNC") as refused:
            scanner.scan(memory.address, memory.address + PAGE, protect=True)
        assert refused.value.errno == errno.EPERM


def test_an_old_kernel_is_told_by_its_cure(monkeypatch):
    def old(*_, **__):
        raise KernelError("PAGEMAP_SCAN", errno.ENOTTY)

    monkeypatch.setattr("postcopy.kernel.pagemap.ioctl", old)
    with PagemapScanner(0) as scanner, pytest.raises(KernelError, match=r"Linux 6\.7 or newer"):
        scanner.scan(0, PAGE, protect=False)


def test_what_a_call_protected_before_it_failed_counts_as_written(monkeypatch):
    """The kernel does not tell what it was: to send too much harms nothing."""
    left = [errno.ENOMEM]

    def failing(*arguments, **more):
        if left:
            raise KernelError("PAGEMAP_SCAN", left.pop())
        return calls.ioctl(*arguments, **more)

    with tracked() as w, PagemapScanner(0) as scanner:
        scan(scanner, w)
        w.memory.write(3 * PAGE, b"x")
        monkeypatch.setattr("postcopy.kernel.pagemap.ioctl", failing)
        assert scan(scanner, w) == [[0, 64]]
        w.memory.write(5 * PAGE, b"x")
        assert scan(scanner, w) == [[5, 6]]


def test_a_process_that_is_gone_is_named():
    with pytest.raises(KernelError, match="there is no such process"):
        PagemapScanner(1 << 30)


def test_a_process_that_went_away_later_is_named():
    pid = os.fork()
    if pid == 0:
        calls.syscall("pause", 34) if os.uname().machine == "x86_64" else threading.Event().wait()
    with PagemapScanner(pid) as scanner:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        with pytest.raises(KernelError, match="the process is gone"):
            scanner.scan(0, PAGE, protect=False)
        scanner.close()


def test_nothing_to_scan_is_nothing_found():
    with PagemapScanner(0) as scanner:
        assert scanner.scan(PAGE, PAGE, protect=True).shape == (0, 2)
