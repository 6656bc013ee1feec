"""The store of copies: bounded, in order, and nothing is forgotten in it."""

import threading

import numpy as np
import pytest

from fakes.waiting import wait_until
from postcopy.snapshot.bitmap import PageBatch
from postcopy.snapshot.cow_buffer import CowBuffer

PAGE = 4096


def copies_of(pages, number=0):
    contents = np.full((pages, PAGE), number, np.uint8)
    return PageBatch(None, 0, pages, np.arange(pages), contents, np.arange(0))


class Waiter:
    """A call in a thread of its own."""

    def __init__(self, call):
        self.result = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        self.result = self._call()

    @property
    def waits(self):
        return self._thread.is_alive()

    def done(self):
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.result


@pytest.fixture
def aside():
    return CowBuffer(4 * PAGE)


def put(aside, pages, number=0):
    assert aside.reserve(pages * PAGE)
    aside.put(copies_of(pages, number), pages * PAGE)


def test_first_in_first_out(aside):
    put(aside, 1, 1)
    put(aside, 2, 2)
    assert [aside.take().contents[0, 0] for _ in range(2)] == [1, 2]
    assert aside.take() is None


def test_who_finds_no_room_waits_until_some_is_written(aside):
    put(aside, 3)
    waiter = Waiter(lambda: aside.reserve(2 * PAGE))
    copies = aside.take()
    assert waiter.waits
    aside.written(copies)
    assert waiter.done() is True
    assert aside.most_bytes == 3 * PAGE


def test_an_empty_store_takes_what_is_larger_than_itself(aside):
    """A huge page, say."""
    put(aside, 9)
    assert aside.most_bytes == 9 * PAGE


def test_what_was_reserved_in_vain_is_given_back(aside):
    assert aside.reserve(4 * PAGE)
    aside.put(copies_of(1), 4 * PAGE)
    assert aside.is_roomy
    assert aside.total_bytes == PAGE
    put(aside, 3)
    assert not aside.is_roomy


def test_the_rest_includes_what_is_being_copied_now(aside):
    """All pages are saved, but the copies of the last fault are not here yet."""
    assert aside.reserve(2 * PAGE)
    waiter = Waiter(aside.take_rest)
    assert waiter.waits
    aside.put(copies_of(1, 7), 2 * PAGE)
    copies = waiter.done()
    assert copies.contents[0, 0] == 7
    aside.written(copies)
    assert aside.take_rest() is None


def test_the_rest_of_a_fault_that_came_too_late_is_nothing(aside):
    assert aside.reserve(PAGE)
    waiter = Waiter(aside.take_rest)
    aside.put(copies_of(0), PAGE)
    assert waiter.done() is None


def test_closing_wakes_everybody(aside):
    put(aside, 4)
    reserving = Waiter(lambda: aside.reserve(PAGE))
    aside.close()
    assert reserving.done() is False
    copies = aside.take()
    assert copies is not None
    assert aside.take_rest() is None
    assert aside.reserve(PAGE) is False


def test_waiting_is_noticed(aside):
    """The fake above would not notice a call that does not wait at all."""
    waiter = Waiter(lambda: 5)
    wait_until(lambda: not waiter.waits, 10)
    assert waiter.done() == 5
