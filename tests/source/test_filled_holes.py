"""Holes that the guest fills while it is being sent: what arrives is what was there in the end."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.memory.ram_block import RamBlock
from postcopy.parameters import Parameters
from postcopy.source import dirty_pages, precopy
from postcopy.source.counters import Counters, Rate
from postcopy.source.dirty_pages import BlockPages, DirtyPages
from postcopy.source.precopy import Precopy
from postcopy.source.user_requests import UserRequests

PAGES = 600  # more than two batches
STAMP = slice(0, 8)


class Guest:
    """Memory that begins as holes, and a tracker that notes each write to it."""

    def __init__(self, *, is_quick=False):
        self.is_quick = is_quick
        size = PAGES * 4096
        self.block = RamBlock(Region("ram", size, 4096, 0, 1 << 40, memfd.create("t", size)))
        self._written = np.ones(PAGES, np.bool_)
        self._stamp = 0

    def write(self, pages):
        self._stamp += 1
        self.block.pages[pages, STAMP] = np.frombuffer(self._stamp.to_bytes(8, "little"), np.uint8)
        self._written[pages] = True

    def start(self):
        self._written[:] = True

    def collect(self, block, start, end, *, protect):
        found = self._written[start:end].copy()
        if protect:
            self._written[start:end] = False
        return found

    def stop(self):
        pass


class Destination:
    """Takes pages as a sender finds them: what is known to be a hole is not read.

    The guest writes after each batch, while it runs.
    """

    def __init__(self, guest, writes=()):
        self.memory = np.zeros((PAGES, 8), np.uint8)
        self.rate = Rate()
        self.rate.bytes_per_second = 1 << 20
        self._guest = guest
        self.writes_left = list(writes)

    def send(self, pages, batch, behind=b""):
        has_data = pages.has_data(batch)
        self.memory[batch] = 0
        self.memory[batch[has_data]] = pages.block.pages[batch[has_data], STAMP]
        if self.writes_left:
            self._guest.write(self.writes_left.pop(0))
        return 0

    def end_of_round(self):
        pass

    def pace(self, interrupt):
        pass


def by_precopy(pages):
    """Batches as the end of a precopy takes them."""
    start = 0
    while len(batch := pages.next_batch(start, PAGES, 256)):
        yield batch
        start = int(batch[-1]) + 1


def by_postcopy(pages):
    """Batches as the push takes them."""
    while len(batch := pages.next_batch_of_stopped(0, 64)):
        yield batch


def on_demand(pages):
    """Pages as they are asked for."""
    for page in np.flatnonzero(pages.pending)[::-1]:
        yield np.array([page])


def travel(destination, guest, ending, last_write, requests):
    """Send all of the guest, which writes once more just before it stops."""
    dirty = DirtyPages([guest.block], guest)
    dirty.start()
    values = Parameters().with_changes({"downtime-limit": 1000})
    Precopy(dirty, destination, Counters(), requests, lambda: values, lambda _: None).run()
    destination.writes_left.clear()
    guest.write(last_write)
    dirty.collect_all()
    (pages,) = dirty.blocks
    for batch in ending(pages):
        pages.pending[batch] = False
        destination.send(pages, batch)


@pytest.mark.parametrize("ending", [by_precopy, by_postcopy, on_demand])
def test_a_hole_filled_after_the_last_round_is_not_sent_as_zeros(ending):
    guest = Guest()
    destination = Destination(guest)
    travel(destination, guest, ending, [3, 100, 101, PAGES - 1], UserRequests())
    np.testing.assert_array_equal(destination.memory, guest.block.pages[:, STAMP])
    guest.block.close()


some_pages = st.lists(st.integers(0, PAGES - 1), max_size=20)


@given(
    writes=st.lists(some_pages, max_size=6),
    last_write=some_pages,
    ending=st.sampled_from([by_precopy, by_postcopy, on_demand]),
    postcopy=st.booleans(),
    steps=st.sampled_from([None, (600, 600), (100, 100), (100, 30), (7, 3)]),
)
def test_whatever_is_filled_at_whatever_moment_arrives(writes, last_write, ending, postcopy, steps):
    """``steps``: pages that are protected at a time, and after how many it is asked again; or never."""
    guest, requests = Guest(is_quick=steps is not None), UserRequests()
    destination = Destination(guest, writes)
    if postcopy:
        destination.pace = lambda _: requests.postcopy()
    chunk, window = steps or (PAGES, PAGES)
    with (
        mock.patch.object(dirty_pages, "CHUNK_BYTES", chunk * 4096),
        mock.patch.object(precopy, "_WINDOW_PAGES", window),
    ):
        travel(destination, guest, ending, last_write, requests)
    np.testing.assert_array_equal(destination.memory, guest.block.pages[:, STAMP])
    guest.block.close()


def test_a_page_asked_for_during_a_look_ahead_is_not_sent_as_zeros():
    """The push looks ahead, on its thread, just while a request is being answered."""
    guest = Guest()
    guest.write(list(range(PAGES)))
    pages = BlockPages(guest.block)

    class LookedAtMeanwhile:
        """Gives what it holds, and only then does the other thread look."""

        def __getitem__(self, key):
            found = known[key]
            pages.known_data = known
            pages.scan_chunk(0, PAGES)
            return found

    known = pages.known_data
    pages.known_data = LookedAtMeanwhile()
    assert pages.has_data(np.array([5])).all()
    guest.block.close()


def test_a_request_before_the_guest_has_stopped_makes_nothing_final():
    """No destination should ask so early; if one does, it gets no zeros for it."""
    guest = Guest()
    dirty = DirtyPages([guest.block], guest)
    (pages,) = dirty.blocks
    dirty.start()
    pages.pending[:] = False
    pages.scan_window(5)
    guest.write([6])
    dirty.collect_all()
    assert pages.has_data(np.array([6])).all()
    guest.block.close()
