"""A thread for which the kernel has no room now, or none at all."""

import threading

import pytest

from postcopy.errors import HostCannot
from postcopy.kernel import threads


@pytest.fixture
def done():
    return threading.Event()


@pytest.fixture
def thread(done):
    return threading.Thread(target=done.set, name="worker", daemon=True)


def test_that_there_is_no_room_now_is_outlived(no_threads, thread, done):
    no_threads.refuse("worker", times=3)
    assert threads.start(thread) is thread
    assert done.wait(20)


def test_that_there_is_none_is_said_with_the_cure_and_it_can_be_started_later(
    no_threads, thread, done
):
    no_threads.refuse("worker")
    with pytest.raises(HostCannot, match="'worker' cannot be started; raise the limit of threads"):
        threads.start(thread)
    assert not threads.start_if_possible(thread)
    no_threads.allow()
    assert threads.start_if_possible(thread)
    assert done.wait(20)


def test_one_that_was_started_before_is_a_mistake_of_ours(thread, done):
    threads.start(thread)
    assert done.wait(20)
    with pytest.raises(RuntimeError, match="only be started once"):
        threads.start(thread)
