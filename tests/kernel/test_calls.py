"""Calls: what becomes of failures, interruptions and the interpreter lock."""

import errno
import os
import threading

import pytest

from postcopy.abi.ioctl import PlainIoctl
from postcopy.abi.linux import MAP_SHARED, PROT_READ
from postcopy.abi.userfaultfd import UFFDIO_WAKE, uffdio_range
from postcopy.errors import KernelError
from postcopy.kernel import calls, patience

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


class Failing:
    """A call of the C library that fails with these errnos, one after the other, and then works."""

    def __init__(self, *errnos, then=7):
        self.left = list(errnos)
        self.then = then

    def __call__(self, *_):
        if not self.left:
            return self.then
        calls.ctypes.set_errno(self.left.pop(0))
        return -1


@pytest.mark.parametrize("retry", [True, False])
def test_interrupted_requests_are_tried_again_unless_the_interruption_is_the_point(
    monkeypatch, retry
):
    failing = Failing(errno.EINTR, errno.EINTR)
    monkeypatch.setattr(calls, "_ioctl", failing)
    request = PlainIoctl("KVM_RUN", 0xAE80)
    if retry:
        assert calls.ioctl_plain(0, request) == 7
        return
    with pytest.raises(KernelError) as failed:
        calls.ioctl_plain(0, request, retry=False)
    assert failed.value.errno == errno.EINTR
    assert len(failing.left) == 1


CALLS = {
    "_ioctl": lambda: calls.ioctl(0, UFFDIO_WAKE, uffdio_range()),
    "_syscall": lambda: calls.syscall("x", 0),
    "_mmap": lambda: calls.mmap(4096, PROT_READ, MAP_SHARED, 0),
    "_munmap": lambda: calls.munmap(4096, 4096),
    "_madvise": lambda: calls.madvise(4096, 4096, 0),
    "_mincore": lambda: calls.mincore(4096, 4096, 0),
    "_fallocate": lambda: calls.fallocate(0, 0, 0, 1),
    "_process_vm_readv": lambda: calls.read_memory(4096, 4096, 7),
    "_process_vm_writev": lambda: calls.write_memory(4096, 4096, 7),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_passes_is_outlived(monkeypatch, name):
    failing = Failing(errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.ENOMEM)
    monkeypatch.setattr(calls, name, failing)
    CALLS[name]()
    assert not failing.left


@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_pass_is_raised_at_once(monkeypatch, name):
    failing = Failing(errno.EIO, errno.EIO)
    monkeypatch.setattr(calls, name, failing)
    with pytest.raises(KernelError, match="EIO"):
        CALLS[name]()
    assert len(failing.left) == 1


@pytest.mark.parametrize("name", CALLS)
def test_what_lasts_is_raised_in_the_end(monkeypatch, name):
    monkeypatch.setattr(patience, "LASTING_S", 0.01)
    monkeypatch.setattr(calls, name, Failing(*[errno.ENOMEM] * 100_000))
    with pytest.raises(KernelError, match="ENOMEM"):
        CALLS[name]()


def test_a_function_of_python_is_made_again_too():
    left = [errno.ENOMEM, errno.EAGAIN]

    def call(argument):
        if left:
            raise OSError(left.pop(0), "not now")
        return argument

    assert calls.of_python("pipe2", "", call, 5) == 5
    left.append(errno.EMFILE)
    with pytest.raises(KernelError, match=r"^pipe2 failed: .*EMFILE"):
        calls.of_python("pipe2", "", call, 5)


def test_who_is_told_to_stop_waits_no_more():
    stop = threading.Event()
    waits = patience.Patience(stop=stop)
    assert waits.outlives(errno.ENOMEM)
    stop.set()
    assert not waits.outlives(errno.ENOMEM)


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
