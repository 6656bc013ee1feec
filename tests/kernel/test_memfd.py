"""memfds: holes, huge pages, and what is said when the host has too few."""

import errno
import os
from pathlib import Path

import pytest

from postcopy.errors import HostCannot, KernelError
from postcopy.kernel import calls, huge_pages, memfd
from postcopy.kernel.mapping import Mapping

PAGE = 4096
HUGE = 2 << 20


POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def huge_pages_of_the_host(kind: str) -> int:
    path = POOL / f"{kind}_hugepages"
    return int(path.read_text()) if path.exists() else 0


def test_only_memory_that_has_pages_is_emptied(monkeypatch):
    asked = []
    real = calls.fallocate
    monkeypatch.setattr(calls, "fallocate", lambda *a: (asked.append(a), real(*a)))
    fd = memfd.create("new", 4 * PAGE)
    try:
        memfd.empty(fd, 0, 4 * PAGE)
        assert asked == []
        os.pwrite(fd, b"x", 3 * PAGE)
        memfd.empty(fd, 0, 4 * PAGE)
        assert len(asked) == 1
        assert (os.pread(fd, 1, 3 * PAGE), os.fstat(fd).st_blocks) == (b"\0", 0)
    finally:
        os.close(fd)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_memfd_begins_as_a_hole_and_can_be_made_one_again():
    fd = memfd.create("hole", 4 * PAGE)
    try:
        assert (os.fstat(fd).st_size, os.fstat(fd).st_blocks) == (4 * PAGE, 0)
        assert not os.get_inheritable(fd)
        os.posix_fallocate(fd, 0, 4 * PAGE)
        assert os.fstat(fd).st_blocks == 4 * PAGE // 512
        os.pwrite(fd, b"x" * PAGE, PAGE)
        memfd.punch_hole(fd, PAGE, PAGE)
        assert os.pread(fd, 1, PAGE) == b"\0"
        assert (os.fstat(fd).st_size, os.fstat(fd).st_blocks) == (4 * PAGE, 3 * PAGE // 512)
    finally:
        os.close(fd)


def test_an_empty_hole_is_refused():
    fd = memfd.create("hole", PAGE)
    with pytest.raises(KernelError) as refused:
        memfd.punch_hole(fd, 0, 0)
    os.close(fd)
    assert refused.value.errno == errno.EINVAL


def test_too_few_huge_pages_are_refused_with_the_number_that_would_do():
    free = huge_pages_of_the_host("free") - huge_pages_of_the_host("resv")
    wanted, total = free + 1000, huge_pages_of_the_host("nr")
    before = open_descriptors()
    with pytest.raises(HostCannot, match="not enough free huge pages") as refused:
        memfd.create("huge", wanted * HUGE, huge_page_size=HUGE)
    assert f"{wanted} are needed" in str(refused.value)
    assert "1000 are missing" in str(refused.value)
    assert refused.value.cure == f"echo {total + 1000} > {POOL}/nr_hugepages"
    assert open_descriptors() == before


def test_huge_pages_of_another_size_have_a_cure_of_their_own(monkeypatch, tmp_path):
    def full(*_, **__):
        raise KernelError("mmap", errno.ENOMEM)

    monkeypatch.setattr(calls, "mmap", full)
    monkeypatch.setattr(os, "memfd_create", lambda *_: os.open("/dev/zero", os.O_RDONLY))
    monkeypatch.setattr(os, "ftruncate", lambda *_: None)
    monkeypatch.setattr(huge_pages, "POOLS", tmp_path)
    pool = tmp_path / "hugepages-1048576kB"
    pool.mkdir()
    for kind in ("nr", "free", "resv", "surplus"):
        (pool / f"{kind}_hugepages").write_text("0\n")
    with pytest.raises(HostCannot, match=f"1 are missing; echo 1 > {pool}/nr_hugepages"):
        memfd.create("huge", 1, huge_page_size=1 << 30)
    with pytest.raises(HostCannot, match="no huge pages of 16 KiB; give another page size"):
        memfd.create("huge", 1, huge_page_size=16 << 10)


def test_a_huge_memfd_holds_what_is_written(huge_pages):
    huge_pages(1)
    fd = memfd.create("huge", HUGE, huge_page_size=HUGE)
    with Mapping.shared(fd, HUGE) as memory:
        memory.write(HUGE - 4, b"last")
        assert memory.read(HUGE - 4, 4) == b"last"
    os.close(fd)


def test_a_name_too_long_is_the_kernels_error():
    with pytest.raises(KernelError, match="memfd_create"):
        memfd.create("x" * 300, PAGE)
