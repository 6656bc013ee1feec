"""Runs of pages and the page map, each against the obvious slow way."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.memory import page_map_file
from postcopy.memory.page_map import MISSING, RECEIVED, REQUESTED, PageMap
from postcopy.memory.runs import index_runs, next_set, numbers_in, runs

masks = st.lists(st.booleans(), max_size=200).map(lambda bits: np.array(bits, np.bool_))


@given(masks)
def test_runs_cover_what_is_set(mask):
    covered = np.zeros(len(mask), np.bool_)
    found = runs(mask).tolist()
    for start, end in found:
        assert start < end
        assert not covered[max(0, start - 1) : end].any()  # apart, and in order
        covered[start:end] = True
    assert (covered == mask).all()
    assert found == sorted(found)


@given(st.lists(st.integers(0, 50), max_size=60))
def test_index_runs_put_together_give_the_pages(pages):
    array = np.array(pages, np.int64)
    again = []
    for start, end in index_runs(array).tolist():
        assert start < end
        again += range(pages[start], pages[start] + end - start)
    assert again == pages


@given(masks, st.integers(0, 210), st.integers(1, 20))
def test_next_set(mask, start, limit):
    expected = [n for n in range(start, len(mask)) if mask[n]][:limit]
    assert next_set(mask, start, limit).tolist() == expected


@pytest.mark.parametrize("position", [0, 5000, 100_000, 4_999_999])
def test_next_set_finds_one_far_away(position):
    mask = np.zeros(5_000_000, np.bool_)
    mask[position] = True
    assert next_set(mask, 0, 256).tolist() == [position]
    assert next_set(mask, position + 1, 256).tolist() == []


@pytest.fixture
def pages():
    made = PageMap(page_map_file.create(5000), 5000)
    yield made
    made.close()


def test_a_page_goes_its_way(pages):
    assert pages.missing().all()
    assert pages.request(7)
    assert not pages.request(7)
    assert pages.requested().tolist() == [7]
    pages.receive(np.array([7, 8]))
    assert pages.is_settled(7)
    assert not pages.request(8)
    assert pages.requested().tolist() == []
    assert pages.forget(np.array([8, 9])).tolist() == [8]
    assert pages.forget(np.array([9])).tolist() == []
    assert not pages.is_settled(8)
    assert pages.states[7:10].tolist() == [RECEIVED, MISSING, MISSING]
    pages.request(9)
    assert pages.states[9] == REQUESTED
    pages.adopt(np.zeros(len(pages.states), np.bool_))
    assert pages.request(9)


def test_of_eight_who_ask_one_is_told_to(pages):
    gate = threading.Barrier(8)
    asked = []

    def ask():
        gate.wait(10)
        asked.extend(page for page in range(5000) if pages.request(page))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(asked) == list(range(5000))


def test_it_outlives_who_wrote_it():
    fd = page_map_file.create(100)
    kept = os.dup(fd)
    first = PageMap(fd, 100)
    first.receive(slice(10, 20))
    first.close()
    second = PageMap(kept, 100)
    assert np.flatnonzero(~second.missing()).tolist() == list(range(10, 20))
    second.close()


@pytest.mark.parametrize(
    ("ranges", "numbers"),
    [
        ([], []),
        ([(3, 2)], [3, 4]),
        ([(0, 1), (7, 3), (4, 0), (2, 1)], [0, 2, 7, 8, 9]),
        ([(0, 10), (0, 10), (5, 2)], list(range(10))),
        ([(2, 7), (4, 5)], [2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_the_numbers_in_ranges(ranges, numbers):
    found = numbers_in(np.array(ranges, np.int64).reshape(-1, 2), 10)
    assert sorted(set(found.tolist())) == numbers
    assert len(found) <= 10
