"""Calls: what becomes of failures, interruptions and the interpreter lock."""

import errno
import os

import pytest

from postcopy.abi.ioctl import PlainIoctl
from postcopy.abi.mman import MAP_SHARED, PROT_READ
from postcopy.abi.userfaultfd import UFFDIO_WAKE, uffdio_range
from postcopy.errors import KernelError
from postcopy.kernel import calls

BAD_FD = 1 << 20


@pytest.mark.parametrize(
    ("name", "code", "call"),
    [
        ("UFFDIO_WAKE", errno.EBADF, lambda: calls.ioctl(BAD_FD, UFFDIO_WAKE, uffdio_range())),
        ("X", errno.EBADF, lambda: calls.ioctl_plain(BAD_FD, PlainIoctl("X", 1))),
        ("close_range", errno.EINVAL, lambda: calls.syscall("close_range", 436, 2, 1, 0)),
        ("mmap", errno.EBADF, lambda: calls.mmap(4096, PROT_READ, MAP_SHARED, BAD_FD)),
        ("munmap", errno.EINVAL, lambda: calls.munmap(1, 4096)),
        ("madvise", errno.EINVAL, lambda: calls.madvise(4096, 4096, 9999)),
        ("mincore", errno.EINVAL, lambda: calls.mincore(1, 4096, 0)),
        ("fallocate", errno.EBADF, lambda: calls.fallocate(BAD_FD, 0, 0, 1)),
    ],
)
def test_a_failure_names_its_call(name, code, call):
    with pytest.raises(KernelError, match=f"^{name} failed: ") as failed:
        call()
    assert (failed.value.call, failed.value.errno) == (name, code)


@pytest.mark.parametrize("retry", [True, False])
def test_interrupted_requests_are_tried_again_unless_the_interruption_is_the_point(
    monkeypatch, retry
):
    answers = [-1, -1, 7]

    def interrupted(*_):
        calls.ctypes.set_errno(errno.EINTR)
        return answers.pop(0)

    monkeypatch.setattr(calls, "_ioctl", interrupted)
    request = PlainIoctl("KVM_RUN", 0xAE80)
    if retry:
        assert calls.ioctl_plain(0, request) == 7
        return
    with pytest.raises(KernelError) as failed:
        calls.ioctl_plain(0, request, retry=False)
    assert failed.value.errno == errno.EINTR
    assert len(answers) == 2


def test_a_plain_number_is_handed_over_whole():
    """FIONCLEX and friends take none, F_SETFL-like ones 64 bits: nothing may be cut off."""
    read_end, write_end = os.pipe()
    try:
        os.set_inheritable(read_end, True)
        calls.ioctl_plain(read_end, PlainIoctl("FIOCLEX", 0x5451), 1 << 63)
        assert not os.get_inheritable(read_end)
    finally:
        os.close(read_end)
        os.close(write_end)
