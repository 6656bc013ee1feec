"""Idle CPUs are kept awake while somebody asks for it, and no longer."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from fakes.waiting import wait_until
from postcopy.kernel import cpu_latency
from postcopy.kernel.cpu_latency import DEVICE, CpusAwake

ASKED = bytes(4)
FOREVER_NS = 1 << 62


class Device:
    """A FIFO in place of the device: it tells what was written, and whether anybody has it open."""

    def __init__(self, path):
        self.path = path
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.written = b""

    def held(self):
        """Whether there is a request, now; reads what has been written."""
        try:
            while some := os.read(self._fd, 4096):
                self.written += some
        except BlockingIOError:
            return True
        return False

    def let_go(self):
        return not self.held()

    def close(self):
        os.close(self._fd)


class Clock:
    """Stands still until it is told; counts the looks at it."""

    def __init__(self):
        self.now_ns = 0
        self.looks = 0

    def monotonic_ns(self):
        self.looks += 1
        return self.now_ns


@pytest.fixture
def device(tmp_path):
    made = Device(tmp_path / "device")
    yield made
    made.close()


@pytest.fixture
def awake(device):
    made = CpusAwake(device.path)
    yield made
    made.close()


def descriptors():
    """What this process has open."""
    return [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]


def enders():
    return [thread for thread in threading.enumerate() if thread.name == "cpus-awake"]


def test_many_calls_make_one_request_of_no_latency(monkeypatch, device, awake):
    monkeypatch.setattr(cpu_latency, "_WHILE_NS", FOREVER_NS)
    assert not device.held()
    for _ in range(100):
        awake.a_while()
    assert device.held()
    assert device.written == ASKED
    assert len(enders()) == 1


def test_it_ends_by_itself_and_can_be_asked_for_again(device, awake):
    for times in (1, 2):
        awake.a_while()
        wait_until(device.let_go, what="nobody holds it")
        assert device.written == times * ASKED
    wait_until(lambda: not enders(), what="the thread is gone, too")


def test_it_lasts_while_it_is_asked_for(monkeypatch, device, awake):
    clock = Clock()
    monkeypatch.setattr(cpu_latency, "time", clock)
    for _ in range(2):
        awake.a_while()
        clock.now_ns += cpu_latency._WHILE_NS - 1
        looks = clock.looks
        # Who looks for a second time has not ended it at the first.
        wait_until(lambda before=looks: clock.looks >= before + 2, what="the ender looks")
        assert device.held()
    clock.now_ns += 1
    wait_until(device.let_go, what="nobody holds it")
    assert device.written == ASKED


def test_who_calls_in_the_moment_of_its_end_is_not_forgotten(monkeypatch, device, awake):
    """The ender finds that the time is over, and just then somebody calls."""
    lock, decided = awake._lock, threading.Event()

    class Noted:
        def __enter__(self):
            decided.set()
            lock.acquire()

        def __exit__(self, *_):
            lock.release()

    def call():
        awake.a_while()
        decided.set()  # if it has had a look, and found nothing to do

    def now_ns():
        if threading.current_thread() in enders() and not calling.ident:
            decided.clear()
            calling.start()
            assert decided.wait(10)
        return 2 * cpu_latency._WHILE_NS if calling.ident else 0

    calling = threading.Thread(target=call)
    monkeypatch.setattr(cpu_latency, "time", SimpleNamespace(monotonic_ns=now_ns))
    monkeypatch.setattr(awake, "_lock", Noted())
    awake.a_while()
    wait_until(lambda: calling.ident, what="the time is over")
    calling.join(10)
    assert device.held()
    assert device.written == 2 * ASKED


def test_closing_ends_it_at_once_and_for_good(monkeypatch, device, awake):
    monkeypatch.setattr(cpu_latency, "_WHILE_NS", FOREVER_NS)
    awake.a_while()
    awake.close()
    assert not device.held()
    awake.a_while()
    awake.close()
    assert not device.held()
    assert device.written == ASKED
    assert enders() == []


def test_what_was_never_asked_for_can_be_closed(device, awake):
    awake.close()
    awake.a_while()
    assert not device.held()
    assert device.written == b""


def test_calls_ends_and_closing_may_meet(monkeypatch, device, awake):
    monkeypatch.setattr(cpu_latency, "_WHILE_NS", 0)
    monkeypatch.setattr(cpu_latency, "_LOOK_S", 0)
    calls = []

    def call():
        for _ in range(200):
            awake.a_while()
            calls.append(1)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(calls) > 300, what="calls")
    awake.close()
    assert not device.held()
    for thread in threads:
        thread.join(10)
    assert not device.held()
    assert device.written
    assert len(device.written) % len(ASKED) == 0
    wait_until(lambda: not enders(), what="no thread is left")


def test_a_host_without_the_device_does_without(tmp_path):
    awake = CpusAwake(tmp_path / "none")
    for _ in range(2):
        awake.a_while()
    awake.close()
    assert enders() == []


def test_a_device_that_refuses_is_let_go_of():
    full = Path("/dev/full")  # each write to it fails
    awake = CpusAwake(full)
    for _ in range(2):
        awake.a_while()
    assert full not in descriptors()
    assert enders() == []
    awake.close()


def test_without_another_thread_there_is_no_request(monkeypatch, device, awake):
    """Nobody would end it."""

    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    awake.a_while()
    assert not device.held()
    awake.close()


def test_the_kernel_takes_it(monkeypatch):
    if not os.access(DEVICE, os.W_OK):
        cure = f"run as root, or setfacl -m u:{os.getuid()}:w {DEVICE}, or pass it to the container"
        pytest.skip(f"needs {DEVICE}: {cure}")
    monkeypatch.setattr(cpu_latency, "_WHILE_NS", FOREVER_NS)
    awake = CpusAwake()
    assert DEVICE not in descriptors()
    awake.a_while()
    assert descriptors().count(DEVICE) == 1
    awake.close()
    assert DEVICE not in descriptors()
