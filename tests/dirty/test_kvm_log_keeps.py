"""KVM forgets what it has told; the tracker must not, whoever asks in between and for what."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from postcopy.dirty.tracker import KvmLogTracker

CHUNK = 8


class Block:
    """A block of the guest: as far as a tracker looks at it."""

    def __init__(self, name, page_count, page_size_bytes=4096):
        self.name = name
        self.page_count = page_count
        self.page_size_bytes = page_size_bytes
        self.per_page = page_size_bytes // 4096


BLOCKS = [Block("ram", 24), Block("rom", 16), Block("huge", 8, 8192)]


class Log:
    """A guest's process with KVM's logs: each is empty again when it has been fetched."""

    def __init__(self):
        self.bits = {each.name: self._none(each) for each in BLOCKS}

    @staticmethod
    def _none(block):
        return np.zeros(block.page_count * block.per_page, np.bool_)

    def start_dirty_log(self):
        pass

    def fetch_dirty_log(self, block):
        told = self.bits[block].copy()
        self.bits[block][:] = False
        return np.packbits(told, bitorder="little").tobytes()


blocks = st.sampled_from(BLOCKS)
writes = st.tuples(st.just("write"), blocks, st.integers(0, 23))
looks = st.tuples(st.just("look"), blocks, st.integers(1, 24))
turns = st.tuples(st.just("turn"), blocks, st.sampled_from(range(0, 24, CHUNK)))


@given(st.lists(st.one_of(writes, looks, turns), max_size=60))
def test_a_write_is_told_by_the_end_of_its_own_block_however_often_one_looks(steps):
    log = Log()
    tracker = KvmLogTracker(log)
    tracker.start()
    unsent = {each.name: np.ones(each.page_count, np.bool_) for each in BLOCKS}
    for step, block, number in steps:
        at = number % block.page_count
        mine = unsent[block.name]
        if step == "write":
            log.bits[block.name][at * block.per_page] = mine[at] = True
        elif step == "look":
            tracker.collect(block, 0, at + 1, protect=False)
        else:
            told = tracker.collect(block, at, at + CHUNK, protect=True)
            mine[at : at + CHUNK] &= ~told
    for block in BLOCKS:
        told = tracker.collect(block, 0, block.page_count, protect=False)
        assert not (unsent[block.name] & ~told).any()


def test_what_is_written_in_one_block_is_not_told_of_another():
    log = Log()
    tracker = KvmLogTracker(log)
    tracker.start()
    for block in BLOCKS:  # all of it counts as written at first
        assert tracker.collect(block, 0, block.page_count, protect=True).all()
    for block, page in zip(BLOCKS, (20, 3, 7), strict=True):
        log.bits[block.name][page * block.per_page] = True
    for block, page in zip(BLOCKS, (20, 3, 7), strict=True):
        told = tracker.collect(block, 0, block.page_count, protect=True)
        assert np.flatnonzero(told).tolist() == [page]
