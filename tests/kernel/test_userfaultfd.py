"""Every request and event of a userfaultfd, on memory that threads of this process touch."""

import ctypes
import errno
import os
import resource
import select
import signal
import socket

import pytest
from watched import PAGE, Mapping, Toucher, in_child, memory_of, open_or_skip, watched

from fakes.uffd_events import Fork, Pagefault, Remap, Remove, Unmap, parse, read_events
from postcopy.abi.userfaultfd import Feature, PagefaultFlag, RangeIoctl, RegisterMode
from postcopy.errors import HostCannot, KernelError, PageExists
from postcopy.kernel import calls, memfd, userfaultfd, userfaultfd_open
from postcopy.kernel.userfaultfd import MESSAGE, Userfaultfd

KINDS = pytest.mark.parametrize("kind", ["anonymous", "memfd"])
WP = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED


@KINDS
def test_a_missing_page_is_told_and_placed(kind):
    with watched(kind, features=Feature.THREAD_ID) as w:
        toucher = w.read_in_thread(3)
        fault = w.event()
        assert fault == Pagefault(w.at(3), PagefaultFlag(0), toucher.thread_id)
        assert read_events(w.watcher) == []
        assert w.watcher.copy(fault.address, w.source(3), PAGE) == PAGE
        assert toucher.done() == b"\4\4\4\4"


def test_a_write_says_so_and_no_thread_is_named_unasked():
    with watched() as w:
        toucher = w.write_in_thread(1, b"new")
        assert w.event() == Pagefault(w.at(1), PagefaultFlag.WRITE, 0)
        w.watcher.copy(w.at(1), w.source(1), PAGE)
        toucher.done()
        assert w.memory.read(PAGE, 4) == b"new\2"


def test_exact_addresses_are_exact():
    with watched(features=Feature.EXACT_ADDRESS) as w:
        toucher = w.touch(lambda: plain_read(w.memory.address + PAGE + 100))
        assert w.event().address == w.at(1) + 100
        w.watcher.copy(w.at(1), w.source(1), PAGE)
        toucher.done()


@KINDS
def test_a_run_stops_at_a_page_that_exists(kind):
    with watched(kind) as w:
        assert w.watcher.copy(w.at(3), w.source(0), PAGE) == PAGE
        assert w.watcher.copy(w.at(0), w.source(0), 8 * PAGE) == 3 * PAGE
        with pytest.raises(PageExists, match=f"{w.at(3):#x}") as exists:
            w.watcher.copy(w.at(3), w.source(3), 5 * PAGE)
        assert exists.value.errno == errno.EEXIST
        assert w.watcher.copy(w.at(4), w.source(4), 4 * PAGE) == 4 * PAGE
        assert w.memory.read(3 * PAGE, 1) == b"\1"  # the older copy did not overwrite it
        assert w.memory.read(4 * PAGE, 1) == b"\5"


@KINDS
def test_zero_pages(kind):
    with watched(kind) as w:
        toucher = w.read_in_thread(0)
        w.event()
        assert w.watcher.zeropage(w.at(0), 4 * PAGE) == 4 * PAGE
        assert toucher.done() == bytes(4)
        with pytest.raises(PageExists):
            w.watcher.zeropage(w.at(3), PAGE)


def test_placing_without_waking_leaves_the_thread_waiting_until_it_is_woken():
    with watched() as w:
        toucher = w.read_in_thread(0)
        w.event()
        w.watcher.copy(w.at(0), w.source(0), PAGE, wake=False)
        assert toucher.waits
        w.watcher.wake(w.at(0), PAGE)
        assert toucher.done() == b"\1\1\1\1"


def test_a_wake_tells_again_of_faults_that_were_read_but_not_answered():
    with watched() as w:
        toucher = w.read_in_thread(5)
        first = w.event()
        w.watcher.wake(w.memory.address, w.memory.length)
        assert w.event() == first
        w.watcher.copy(w.at(5), w.source(5), PAGE)
        toucher.done()


@KINDS
def test_a_protected_page_keeps_its_content_until_writing_is_allowed(kind):
    with watched(kind, features=WP, mode=RegisterMode.WP) as w:
        w.memory.write(0, b"old!")
        w.watcher.write_protect(w.at(0), 8 * PAGE, protect=True)
        toucher = w.write_in_thread(0, b"new!")
        assert w.event() == Pagefault(w.at(0), PagefaultFlag.WRITE | PagefaultFlag.WP, 0)
        assert w.memory.read(0, 4) == b"old!"
        w.watcher.write_protect(w.at(0), PAGE, protect=False, wake=False)
        assert toucher.waits
        w.watcher.wake(w.at(0), PAGE)
        toucher.done()
        assert w.memory.read(0, 4) == b"new!"


@KINDS
def test_the_first_write_to_an_untouched_protected_page_is_told(kind):
    with watched(kind, features=WP, mode=RegisterMode.WP) as w:
        w.watcher.write_protect(w.at(0), 8 * PAGE, protect=True)
        toucher = w.write_in_thread(2, b"new!")
        assert w.event().address == w.at(2)
        w.watcher.write_protect(w.at(2), PAGE, protect=False)
        toucher.done()


def test_pages_can_be_placed_protected():
    with watched(features=WP, mode=RegisterMode.MISSING | RegisterMode.WP) as w:
        w.watcher.copy(w.at(0), w.source(0), PAGE, protect=True)
        toucher = w.write_in_thread(0, b"x")
        assert PagefaultFlag.WP in w.event().flags
        w.watcher.write_protect(w.at(0), PAGE, protect=False)
        toucher.done()


def test_a_page_that_the_file_has_is_a_minor_fault():
    fd = memfd.create("minor", 2 * PAGE)
    with (
        Mapping.shared(fd, 2 * PAGE) as guest,
        Mapping.shared(fd, 2 * PAGE) as engine,
        watched(features=Feature.MINOR_SHMEM) as w,
    ):
        os.close(fd)
        ioctls = w.watcher.register(guest.address, 2 * PAGE, RegisterMode.MINOR)
        assert RangeIoctl.CONTINUE in ioctls
        engine.write(0, b"here")
        toucher = w.touch(lambda: guest.read(0, 4))
        assert w.event() == Pagefault(guest.address, PagefaultFlag.MINOR, 0)
        assert w.watcher.map_existing(guest.address, PAGE) == PAGE
        assert toucher.done() == b"here"
        with pytest.raises(PageExists):
            w.watcher.map_existing(guest.address, PAGE)
        with pytest.raises(KernelError) as hole:
            w.watcher.map_existing(guest.address + PAGE, PAGE)
        assert hole.value.errno == errno.EFAULT


@pytest.mark.userfaultfd
@KINDS
def test_whoever_touches_a_poisoned_page_dies_of_it(kind):
    def touch() -> None:
        # No core file, and no traceback by the test run's faulthandler: it is meant to die.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        with watched(kind, features=Feature.POISON) as w:
            assert w.watcher.poison(w.at(0), PAGE) == PAGE
            plain_read(w.memory.address)

    assert in_child(touch) == -signal.SIGBUS


@KINDS
def test_a_poisoned_page_is_refused_to_who_asks_politely(kind):
    with watched(kind, features=Feature.POISON) as w:
        assert w.watcher.poison(w.at(1), PAGE) == PAGE
        w.watcher.copy(w.at(0), w.source(0), PAGE)
        toucher = w.touch(lambda: error_of(lambda: w.memory.read(PAGE - 4, 8)))
        assert toucher.done() == errno.EFAULT
        assert error_of(lambda: w.memory.write(PAGE, b"x")) == errno.EFAULT
        assert w.memory.read(PAGE - 4, 4) == b"\1\1\1\1"


@KINDS
def test_who_waits_for_a_page_is_told_when_it_is_poisoned(kind):
    with watched(kind, features=Feature.POISON) as w:
        toucher = w.touch(lambda: error_of(lambda: w.memory.read(PAGE, 4)))
        w.event()
        assert w.watcher.poison(w.at(1), PAGE) == PAGE
        assert toucher.done() == errno.EFAULT


def error_of(act) -> int:
    with pytest.raises(KernelError) as caught:
        act()
    return caught.value.errno


def plain_read(address: int) -> None:
    """As a vCPU touches memory: by the instruction itself."""
    ctypes.memmove(ctypes.create_string_buffer(1), address, 1)


def test_unregistered_memory_reads_as_zeros():
    with watched() as w:
        toucher = w.read_in_thread(0)
        w.event()
        w.watcher.unregister(w.memory.address, w.memory.length)
        assert toucher.done() == bytes(4)
        with pytest.raises(KernelError) as refused:
            w.watcher.copy(w.at(1), w.source(1), PAGE)
        assert refused.value.errno == errno.ENOENT


def test_a_range_has_one_watcher():
    with watched() as w, open_or_skip() as second, pytest.raises(KernelError) as busy:
        second.register(w.memory.address, w.memory.length, RegisterMode.MISSING)
    assert busy.value.errno == errno.EBUSY


PLACING = {
    "copy": ("copy", lambda w: w.copy(0, 0, PAGE)),
    "zeropage": ("zeropage", lambda w: w.zeropage(0, PAGE)),
    "continue": ("mapped", lambda w: w.map_existing(0, PAGE)),
    "poison": ("updated", lambda w: w.poison(0, PAGE)),
}


class BusyKernel:
    """Answers EAGAIN, with nothing done, the first time."""

    def __init__(self, answer):
        self.calls = 0
        self._answer = answer

    def ioctl(self, _fd, request, argument, **_):
        self.calls += 1
        if self.calls == 1:
            setattr(argument, self._answer, -errno.EAGAIN)
            raise KernelError(request.name, errno.EAGAIN)
        return 0


@pytest.mark.parametrize("request_name", PLACING)
def test_what_is_to_be_placed_is_not_forgotten_by_a_kernel_that_is_busy(monkeypatch, request_name):
    answer, place = PLACING[request_name]
    kernel = BusyKernel(answer)
    monkeypatch.setattr(userfaultfd, "ioctl", kernel.ioctl)
    assert place(Userfaultfd(-1, Feature.MISSING_SHMEM)) == PAGE
    assert kernel.calls == 2


@pytest.mark.parametrize("request_name", PLACING)
def test_but_with_events_whoever_reads_them_is_told(monkeypatch, request_name):
    answer, place = PLACING[request_name]
    kernel = BusyKernel(answer)
    monkeypatch.setattr(userfaultfd, "ioctl", kernel.ioctl)
    assert place(Userfaultfd(-1, Feature.EVENT_REMOVE)) == 0
    assert kernel.calls == 1


def test_placing_waits_for_the_remove_event_to_be_read():
    """EAGAIN while an event is pending: nothing is placed, and nothing is raised."""
    with watched("anonymous", features=Feature.EVENT_REMOVE) as w:
        w.watcher.copy(w.at(0), w.source(0), 2 * PAGE)
        toucher = w.touch(lambda: w.memory.discard(0, 2 * PAGE))
        select.select([w.watcher], [], [], 10)
        assert w.watcher.copy(w.at(4), w.source(4), PAGE) == 0
        assert read_events(w.watcher) == [Remove(w.at(0), w.at(2))]
        toucher.done()
        assert w.watcher.copy(w.at(4), w.source(4), PAGE) == PAGE
        assert w.watcher.copy(w.at(0), w.source(7), PAGE) == PAGE  # it is missing again


def test_unmapping_is_told():
    with watched(features=Feature.EVENT_UNMAP) as w:
        extra = memory_of("memfd", 2)
        w.watcher.register(extra.address, extra.length, RegisterMode.MISSING)
        start = extra.address
        toucher = w.touch(extra.close)
        assert w.event() == Unmap(start, start + 2 * PAGE)
        toucher.done()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="mremap's number: run it on x86_64")
def test_remapping_is_told():
    mremap_number, may_move, fixed = 25, 1, 2
    with watched(features=Feature.EVENT_REMAP) as w, memory_of("anonymous", 2) as target:
        moved = memory_of("memfd", 2)
        w.watcher.register(moved.address, moved.length, RegisterMode.MISSING)
        arguments = (moved.address, 2 * PAGE, 2 * PAGE, may_move | fixed, target.address)
        toucher = w.touch(lambda: calls.syscall("mremap", mremap_number, *arguments))
        assert w.event() == Remap(moved.address, target.address, 2 * PAGE)
        assert toucher.done() == target.address


def fork_while_watched(channel: socket.socket) -> None:
    """Hand a userfaultfd over, and fork when told to."""
    with watched(features=Feature.EVENT_FORK) as w:
        socket.send_fds(channel, [b"here"], [w.watcher.fileno()])
        channel.recv(1)
        assert in_child(lambda: None) == 0


def test_a_forked_child_brings_a_watcher_of_its_own():
    """Told to another process: fork() waits for the reader while it holds the interpreter lock."""
    open_or_skip(Feature.EVENT_FORK).close()  # the right to the device alone is not enough
    ours, theirs = socket.socketpair()
    ours.settimeout(10)

    def watch() -> None:
        _, (descriptor,), _, _ = socket.recv_fds(ours, 4, 1)
        with Userfaultfd.from_fd(descriptor) as watcher:
            ours.send(b"!")
            select.select([watcher], [], [], 10)
            (fork,) = read_events(watcher)
            assert isinstance(fork, Fork)
            Userfaultfd.from_fd(fork.fd).close()

    with ours, theirs:
        pager = Toucher(watch)
        assert in_child(lambda: fork_while_watched(theirs)) == 0
        pager.done()


def test_a_descriptor_can_be_taken_over():
    with watched() as w:
        copy = Userfaultfd.from_fd(os.dup(w.watcher.fileno()))
        toucher = w.read_in_thread(0)
        select.select([copy], [], [], 10)
        assert len(read_events(copy)) == 1
        copy.copy(w.at(0), w.source(0), PAGE)
        toucher.done()
        copy.close()
        copy.close()  # harmless


def test_what_a_range_takes_is_told():
    with watched(mode=RegisterMode.MISSING) as w:
        assert RangeIoctl.COPY | RangeIoctl.ZEROPAGE | RangeIoctl.WAKE in w.ioctls
        assert RangeIoctl.CONTINUE not in w.ioctls


@pytest.mark.userfaultfd
def test_a_missing_feature_is_refused_by_name(monkeypatch):
    def lacks(fd, features):
        if features:
            raise KernelError("UFFDIO_API", errno.EINVAL)
        return Feature.THREAD_ID

    monkeypatch.setattr(userfaultfd_open, "handshake", lacks)
    with pytest.raises(HostCannot, match=r"WP_ASYNC, MOVE; use Linux 6\.8 or newer"):
        Userfaultfd.open(Feature.THREAD_ID | Feature.WP_ASYNC | Feature.MOVE)


@pytest.mark.parametrize(
    ("code", "exists", "cure"),
    [
        (errno.EACCES, True, f"setfacl -m u:{os.getuid()}:rw"),
        (errno.EPERM, False, "sysctl vm.unprivileged_userfaultfd=1"),
        (errno.ENOSYS, False, "CONFIG_USERFAULTFD"),
        (errno.EMFILE, True, "ulimit -n"),
    ],
)
def test_a_closed_door_names_its_key(monkeypatch, tmp_path, code, exists, cure):
    def closed(flags):
        raise KernelError("userfaultfd", code)

    device = tmp_path / "userfaultfd"
    if exists:
        device.touch()
    monkeypatch.setattr(userfaultfd_open, "DEVICE", device)
    monkeypatch.setattr(userfaultfd_open, "by_device", closed)
    monkeypatch.setattr(userfaultfd_open, "by_syscall", closed)
    with pytest.raises(HostCannot) as refused:
        Userfaultfd.open()
    assert cure in refused.value.cure


def test_events_are_read_in_order_and_unknown_ones_passed_over():
    messages = b"".join(
        MESSAGE.pack(code, 1, 0x1000, 7 | 1 << 40) for code in (0x12, 0x7F, 0x14, 0x15, 0x16, 0x13)
    )
    assert parse(messages) == [
        Pagefault(0x1000, PagefaultFlag.WRITE, 7),
        Remap(1, 0x1000, 7 | 1 << 40),
        Remove(1, 0x1000),
        Unmap(1, 0x1000),
        Fork(1),
    ]
