"""Memory of a tmpfs of our own: huge where it can be, and missing page by page all the same."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from postcopy.errors import KernelError
from postcopy.kernel import calls, huge_tmpfs, memfd
from postcopy.kernel.mapping import Mapping

PAGE = 4096
HUGE = 2 << 20


@pytest.fixture
def file():
    try:
        fd = huge_tmpfs.create(4 * HUGE)
    except KernelError as error:
        pytest.skip(f"{error}: needs root (CAP_SYS_ADMIN) and a kernel with transparent huge pages")
    yield fd
    os.close(fd)


def huge_bytes_mapped() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("ShmemPmdMapped"))


def test_it_is_one_hole_that_takes_huge_pages_when_written_to(file):
    assert (os.fstat(file).st_size, os.fstat(file).st_blocks) == (4 * HUGE, 0)
    assert not os.get_inheritable(file)
    before = huge_bytes_mapped()
    with Mapping.shared(file, 4 * HUGE) as memory:
        assert memory.address % HUGE == 0
        memory.write(HUGE, b"x")
        assert os.fstat(file).st_blocks * 512 == HUGE
        assert huge_bytes_mapped() - before == HUGE
    assert os.pread(file, 2, HUGE) == b"x\0"


def test_a_small_page_of_a_huge_one_can_be_emptied_by_itself(file):
    with Mapping.shared(file, 4 * HUGE) as memory:
        memory.view()[:HUGE] = 7
        memfd.punch_hole(file, 3 * PAGE, PAGE)
        view = memory.view()[:HUGE].reshape(-1, PAGE)
        assert np.flatnonzero((view == 0).all(axis=1)).tolist() == [3]


def test_it_may_be_larger_than_half_of_the_hosts_memory():
    host = os.sysconf("SC_PHYS_PAGES") * PAGE
    try:
        fd = huge_tmpfs.create(host)
    except KernelError as error:
        pytest.skip(f"{error}: needs root (CAP_SYS_ADMIN) and a kernel with transparent huge pages")
    try:
        assert os.fstatvfs(fd).f_blocks == 0  # no limit
    finally:
        os.close(fd)


def test_nothing_is_attached_or_left_open(file):
    mounts = Path("/proc/self/mountinfo").read_text()
    before = len(list(Path("/proc/self/fd").iterdir()))
    os.close(huge_tmpfs.create(HUGE))
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert len(list(Path("/proc/self/fd").iterdir())) == before


WITHOUT_RIGHTS = """
import os, sys
from postcopy.errors import KernelError
from postcopy.kernel import huge_tmpfs, memfd
os.setresuid(65534, 65534, 65534)
try:
    huge_tmpfs.create(1 << 21)
except KernelError as error:
    print(error.errno)
fd = memfd.create_transparent("guest", 1 << 21)
print(os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size)
"""


def test_without_the_right_to_mount_it_is_a_memfd():
    if os.getuid():
        pytest.skip("needs root, to give its rights up")
    told = subprocess.run(
        [sys.executable, "-c", WITHOUT_RIGHTS], capture_output=True, text=True, check=True
    )
    assert told.stdout.split("\n")[:2] == [
        str(errno.EPERM),
        f"/memfd:guest (deleted) {HUGE}",
    ]


def test_a_kernel_without_such_mounts_gives_a_memfd(monkeypatch):
    def refuse(name, *_):
        raise KernelError(name, errno.ENOSYS)

    monkeypatch.setattr(calls, "syscall", refuse)
    fd = memfd.create_transparent("guest", HUGE)
    try:
        assert "memfd:guest" in str(Path(f"/proc/self/fd/{fd}").readlink())
    finally:
        os.close(fd)
