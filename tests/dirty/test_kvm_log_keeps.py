"""KVM forgets what it has told; the tracker must not, whoever asks in between and for what."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from postcopy.dirty.kvm_log import KvmLogTracker

PAGES, CHUNK = 24, 8


class Log:
    """A guest's process with KVM's log: it is empty again when it has been fetched."""

    def __init__(self):
        self.bits = np.zeros(PAGES, np.bool_)

    def kvm_dirty_log(self, action):
        if action != "fetch":
            return b""
        told, self.bits = self.bits, np.zeros(PAGES, np.bool_)
        return np.packbits(told, bitorder="little").tobytes()


class Block:
    page_size_bytes = 4096
    page_count = PAGES


writes = st.tuples(st.just("write"), st.integers(0, PAGES - 1))
looks = st.tuples(st.just("look"), st.integers(1, PAGES))
turns = st.tuples(st.just("turn"), st.sampled_from(range(0, PAGES, CHUNK)))


@given(st.lists(st.one_of(writes, looks, turns), max_size=40))
def test_a_write_is_told_by_the_end_however_often_one_looks(steps):
    log = Log()
    tracker = KvmLogTracker(log)
    tracker.start()
    unsent = np.ones(PAGES, np.bool_)
    for step, at in steps:
        if step == "write":
            log.bits[at] = unsent[at] = True
        elif step == "look":
            tracker.collect(Block, 0, at, protect=False)
        else:
            told = tracker.collect(Block, at, at + CHUNK, protect=True)
            unsent[at : at + CHUNK] &= ~told
    told = tracker.collect(Block, 0, PAGES, protect=False)
    assert not (unsent & ~told).any()
