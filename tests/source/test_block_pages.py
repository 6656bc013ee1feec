"""What is known of holes is asked for once, and never guessed."""

import numpy as np
import pytest

from postcopy.source.dirty_pages import BlockPages

COUNT = 10_000


class Block:
    """A block in which every third page has memory; counts how often anybody looks."""

    page_count = COUNT

    def __init__(self):
        self.looks = []
        self.filled = np.arange(COUNT) % 3 == 0

    def has_data(self, start, end):
        self.looks.append((start, end))
        return self.filled[start:end].copy()


@pytest.fixture
def pages():
    return BlockPages(Block())


def test_of_a_stopped_guest_each_window_is_looked_at_once(pages):
    for page in (5, 6, 4095, 4097, 6, 9999, 5):
        pages.scan_window(page)
    assert pages.block.looks == [(0, 4096), (4096, 8192), (8192, COUNT)]
    batch = np.array([0, 1, 2, 3, 5000, 5001, 9999])
    assert pages.has_data(batch).tolist() == pages.block.filled[batch].tolist()
    assert len(pages.block.looks) == 3


def test_a_hole_that_was_filled_since_is_seen_while_the_guest_runs(pages):
    batch = np.array([10, 11])
    assert pages.has_data(batch).tolist() == [False, False]
    pages.block.filled[11] = True
    assert pages.has_data(batch).tolist() == [False, True]


def test_all_batches_of_a_stopped_guest_are_all_pages(pages):
    pages.pending[::7] = False
    expected = np.flatnonzero(pages.pending)
    found, position = [], 0
    while len(batch := pages.next_batch_of_stopped(position, 64)):
        assert np.count_nonzero(pages.block.filled[batch]) <= 64
        pages.pending[batch] = False
        found.append(batch)
        position = int(batch[-1]) + 1
    assert np.concatenate(found).tolist() == expected.tolist()
    assert pages.block.looks == [(0, 4096), (4096, 8192), (8192, COUNT)]


def test_zero_pages_that_are_left_out_are_to_be_had_on_request(pages):
    pages.pending[:6] = False  # sent before
    pages.leave_zeros_out()
    assert np.flatnonzero(pages.pending).tolist() == list(range(6, COUNT, 3))
    assert pages.take(3, 10).tolist() == [6, 7, 8, 9]
    assert pages.take(7, 8).tolist() == []
    assert pages.take(10, 11).tolist() == [10]
    pages.end_requests()
    assert pages.take(11, 12).tolist() == []
    assert pages.take(12, 13).tolist() == [12]
    assert np.flatnonzero(pages.pending).tolist() == list(range(15, COUNT, 3))
