"""Calls and notes between two ends; here both are in one process."""

import contextlib
import gc
import os
import resource
import socket
import threading
import weakref
from pathlib import Path

import pytest

from fakes.waiting import wait_until
from postcopy.errors import (
    EngineDied,
    HostCannot,
    KernelError,
    PostcopyError,
    StreamError,
    WrongState,
)
from postcopy.link.rpc import Link
from postcopy.link.values import sent


class Far:
    """What can be sent to the second end."""

    def add(self, a, b): ...
    def note(self, n): ...
    def slow(self): ...
    def open(self): ...
    def take(self, fds): ...
    def fail(self, kind): ...
    def fault(self): ...
    def long(self, n): ...
    def open_closed(self): ...
    def slow_open(self): ...
    def refuse(self): ...
    def unknown(self): ...
    def pause(self): ...
    def touch(self): ...


class Ends:
    """Two links, and what came to the second one."""

    def __init__(self):
        first, second = socket.socketpair()
        self.ended = []
        self.notes = []
        self.release = threading.Event()
        handlers = {
            "add": lambda a, b: a + b,
            "note": self.notes.append,
            "slow": lambda: self.release.wait(10),
            "open": lambda: ("read end", sent(self.pipe)),
            "take": self.take,
            "fail": self.fail,
            "fault": lambda: 1 // 0,
            "long": lambda n: "x" * n,
            "open_closed": lambda: sent([closed_descriptor()]),
            "slow_open": lambda: (self.release.wait(10), sent(self.pipe)),
            "refuse": self.refuse,
        }
        self.pipe = os.pipe()
        self.far = Link(second, handlers, on_end=lambda: self.ended.append("far"), name="far")
        self.near = Link(first, {"add": lambda a, b: -a - b}, on_end=self._near_ended)
        self.far.start()
        self.near.start()

    def _near_ended(self):
        self.ended.append("near")

    @staticmethod
    def take(fds):
        found = [os.read(fd, 10).decode() for fd in fds]
        for fd in fds:
            os.close(fd)
        return found

    @staticmethod
    def refuse():
        raise WrongState("not now")

    @staticmethod
    def fail(kind):
        errors = {
            "stream": StreamError("bad bytes", 16),
            "kernel": KernelError("UFFDIO_COPY", 14, "at 0x1000"),
            "host": HostCannot("no userfaultfd", "run as root"),
        }
        raise errors[kind]

    def close(self):
        self.near.close()
        wait_until(lambda: sorted(self.ended) == ["far", "near"], 10, "both ends end")


def closed_descriptor():
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    return fd


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def room_for(descriptors):
    """This process cannot have more than so many files open besides those that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    made = [os.open(os.devnull, os.O_RDONLY) for _ in range(descriptors + 1)]
    for fd in made:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(made), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def ends():
    made = Ends()
    yield made
    made.close()
    for fd in made.pipe:
        os.close(fd)


def test_calls_both_ways(ends):
    assert ends.near.call(Far.add, a=1, b=2) == 3
    assert ends.far.call(Far.add, a=1, b=2) == -3


def test_notes_keep_their_order(ends):
    ends.far._handlers["note"] = lambda n: ends.notes.append(int(n))
    for number in range(500):
        ends.near.note(Far.note, n=number)
    wait_until(lambda: len(ends.notes) == 500)
    assert ends.notes == list(range(500))


def test_a_call_that_waits_holds_up_no_other(ends):
    slow = threading.Thread(target=ends.near.call, args=(Far.slow,))
    slow.start()
    assert ends.near.call(Far.add, a=2, b=2) == 4
    assert slow.is_alive()
    ends.release.set()
    slow.join(10)
    assert not slow.is_alive()


def test_a_caller_may_give_up(ends):
    with pytest.raises(TimeoutError):
        ends.near.ask(Far.slow).wait(0.01)
    ends.release.set()
    assert ends.near.call(Far.add, a=1, b=1) == 2


def test_descriptors_come_with_the_answer(ends):
    result, fds = ends.near.call(Far.open)
    assert result == "read end"
    os.write(ends.pipe[1], b"hello")
    assert os.read(fds[0], 10) == b"hello"
    for fd in fds:
        os.close(fd)


def test_descriptors_come_with_the_call_and_in_order(ends):
    pipes = [os.pipe() for _ in range(3)]
    for number, (_, writing) in enumerate(pipes):
        os.write(writing, str(number).encode())
    assert ends.near.call(Far.take, sent([reading for reading, _ in pipes])) == ["0", "1", "2"]
    for pair in pipes:
        for fd in pair:
            os.close(fd)


def test_many_descriptors_from_many_threads_find_their_calls(ends):
    found = []

    def ask(number):
        reading, writing = os.pipe()
        os.write(writing, str(number).encode())
        found.append(ends.near.call(Far.take, sent([reading])) == [str(number)])
        os.close(reading)
        os.close(writing)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [True] * 32


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("stream", StreamError, "bad bytes (at byte 0x10)"),
        ("kernel", KernelError, "UFFDIO_COPY failed: Bad address (EFAULT): at 0x1000"),
        ("host", HostCannot, "no userfaultfd; run as root"),
    ],
)
def test_an_error_comes_back_as_what_it_was(ends, kind, error, text):
    with pytest.raises(error) as caught:
        ends.near.call(Far.fail, kind)
    assert type(caught.value) is error
    assert str(caught.value) == text


def test_a_mistake_of_ours_does_not_leave_the_caller_waiting(ends):
    with pytest.raises(PostcopyError, match=r"internal error in fault: .*please report it"):
        ends.near.call(Far.fault)


def test_long_messages(ends):
    assert len(ends.near.call(Far.long, n=5_000_000)) == 5_000_000


def test_the_end_fails_whoever_waits(ends):
    caught = []

    def wait():
        with pytest.raises(EngineDied):
            ends.near.call(Far.slow)
        caught.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: threads_named("slow"), 10, "it has come")
    ends.far.close()
    thread.join(10)
    assert caught == [True]
    with pytest.raises(EngineDied, match="add: the other process is gone"):
        ends.near.call(Far.add, a=1, b=1)
    ends.near.note(Far.note, n=1)  # silently nothing
    ends.release.set()


def test_what_is_at_work_is_completed_before_its_end_is_told():
    """A guest that is let go on because its engine has died must not be paused by it afterwards."""
    ours, theirs = socket.socketpair()
    release, begun, order = threading.Event(), threading.Barrier(3), []

    def handler(name):
        begun.wait(10)
        release.wait(10)
        order.append(name)

    near = Link(
        ours,
        {"pause": lambda: handler("pause"), "touch": lambda: handler("touch")},
        on_end=lambda: order.append("end"),
        completed=frozenset({"pause"}),
    )
    far = Link(theirs, {})
    near.start()
    far.start()
    callers = [
        threading.Thread(target=lambda name=name: _call_in_vain(far, name), daemon=True)
        for name in ("pause", "touch")
    ]
    for caller in callers:
        caller.start()
    begun.wait(10)
    far.close()
    for caller in callers:
        caller.join(10)  # they have been told: the socket is shut, both ways
    wait_until(lambda: near._ended, 10, "the end is seen")
    assert order == []
    release.set()
    near.wait_over()
    wait_until(lambda: len(order) == 3, 10, "all is done")
    assert order.index("pause") < order.index("end")


def _call_in_vain(link, name):
    with pytest.raises(EngineDied):
        link.call(getattr(Far, name))


@pytest.mark.parametrize("fds", [lambda: [closed_descriptor()], lambda: [0] * 300])
def test_what_cannot_be_sent_is_said_to_who_sends_it(ends, fds):
    with pytest.raises(KernelError, match="sendmsg failed"):
        ends.near.ask(Far.take, sent(fds())).wait(10)
    assert ends.near.call(Far.add, a=1, b=2) == 3


def test_an_answer_that_cannot_be_sent_is_an_error(ends):
    with pytest.raises(KernelError, match=r"sendmsg failed: Bad file descriptor \(EBADF\)"):
        ends.near.ask(Far.open_closed).wait(10)
    assert ends.near.call(Far.add, a=1, b=2) == 3


@pytest.mark.parametrize("room", [0, 1, 2])
def test_who_has_no_room_for_descriptors_gets_no_call(ends, room):
    pairs = [os.pipe() for _ in range(3)]
    for number, (_, writing) in enumerate(pairs):
        os.write(writing, str(number).encode())
    reading = [pair[0] for pair in pairs]
    before = open_files()
    with room_for(room), pytest.raises(HostCannot, match=f"{room} of 3 file descriptors.*prlimit"):
        ends.near.ask(Far.take, sent(reading)).wait(10)
    assert open_files() == before
    assert ends.near.call(Far.take, sent(reading)) == ["0", "1", "2"]
    for pair in pairs:
        for fd in pair:
            os.close(fd)


def test_more_descriptors_than_a_message_takes_are_refused(ends):
    before = open_files()
    with pytest.raises(HostCannot, match="128 of 200 file descriptors arrived"):
        ends.near.ask(Far.take, sent([0] * 200)).wait(10)
    assert open_files() == before


@pytest.mark.parametrize("room", [0, 1])
def test_who_has_no_room_for_descriptors_gets_no_answer(ends, room):
    before = open_files()
    with room_for(room), pytest.raises(HostCannot, match=f"{room} of 2 file descriptors"):
        ends.near.ask(Far.open).wait(10)
    assert open_files() == before
    result, fds = ends.near.call(Far.open)
    assert result == "read end"
    for fd in fds:
        os.close(fd)


def test_the_descriptors_of_an_answer_that_comes_too_late_are_closed(ends):
    before = open_files()
    for _ in range(5):
        with pytest.raises(TimeoutError):
            ends.near.ask(Far.slow_open).wait(0.001)
    ends.release.set()
    assert ends.near.call(Far.add, a=1, b=1) == 2
    wait_until(lambda: open_files() == before, 10, "all are closed")


def test_descriptors_that_nobody_has_taken_are_closed_with_the_link():
    ours, theirs = socket.socketpair()
    before = open_files() - 1
    link = Link(ours, {})
    socket.send_fds(theirs, [b"\x20\0\0\0{"], [0, 1])  # and no more of that message
    theirs.close()
    link.start()
    link.wait_over()
    assert open_files() == before - 1


def test_an_answer_is_kept_by_who_waits_for_it_alone(ends):
    answer = ends.near.ask(Far.add, a=1, b=2)
    assert answer.wait(10) == 3
    kept = weakref.ref(answer)
    del answer
    wait_until(lambda: gc.collect() >= 0 and kept() is None, 10, "it is let go of")


def test_a_note_that_comes_at_the_wrong_time_harms_nothing(ends, caplog):
    ends.near.note(Far.refuse)
    assert ends.near.call(Far.add, a=1, b=1) == 2
    assert "refuse comes at the wrong time: not now" in caplog.text
    assert ends.ended == []


@pytest.mark.parametrize("name", ["fault", "unknown"])
def test_a_mistake_of_ours_in_a_note_ends_the_link_and_is_said(ends, caplog, name):
    """What it was to do will never be done: either side knows what to do without the other."""
    ends.near.note(getattr(Far, name))
    wait_until(lambda: sorted(ends.ended) == ["far", "near"], 10, "both ends end")
    assert f"internal error in {name}; please report it" in caplog.text


def test_without_another_thread_calls_are_answered_one_at_a_time(ends, no_threads):
    """One that comes while the only thread is at work is refused, and never waits for that."""
    no_threads.refuse("far-answers")
    for number in range(20):
        assert ends.near.call(Far.add, a=number, b=1) == number + 1
    slow = ends.near.ask(Far.slow)
    cure = "add: the thread 'far-answers' cannot be started; raise the limit of threads"
    with pytest.raises(HostCannot, match=cure):
        ends.near.ask(Far.add, a=1, b=1).wait(10)
    ends.release.set()
    assert slow.wait(10)
    no_threads.allow()
    assert ends.near.call(Far.add, a=1, b=1) == 2


def test_any_number_of_calls_are_answered_at_the_same_time(ends):
    slow = [ends.near.ask(Far.slow) for _ in range(30)]
    assert ends.near.call(Far.add, a=1, b=1) == 2
    ends.release.set()
    assert all(answer.wait(10) for answer in slow)
    wait_until(lambda: threads_named("far-answers") <= 4, 10, "threads that have nothing to do end")


def threads_named(name):
    return sum(thread.name == name for thread in threading.enumerate())


def test_the_end_comes_to_who_waits_to_send():
    ours, theirs = socket.socketpair()
    near = Link(ours, {})
    near.start()
    caught = []

    def send():
        with pytest.raises(EngineDied):
            near.call(Far.long, "x" * 10_000_000)
        caught.append(True)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    theirs.recv(1)  # it has begun, and the rest is never read
    near.close()
    sender.join(10)
    assert caught == [True]
    near.wait_over()
    theirs.close()
