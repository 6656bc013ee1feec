"""Zero pages are found where they lie: no byte is missed, the others go out as they are."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from postcopy.stream.numbers import PAGE_RECORD_BYTES
from postcopy.stream.ram_encoder import PageEncoder


@given(st.sets(st.tuples(st.integers(0, 19), st.integers(0, 4095)), max_size=12))
def test_no_byte_is_missed(written):
    memory = np.zeros((20, 4096), np.uint8)
    for page, offset in written:
        memory[page, offset] = 1
    pages = np.array([3, 0, 19, 7, 7, 12], np.uint64)
    touched = [page in {page for page, _ in written} for page in pages.tolist()]
    encoder = PageEncoder()
    encoder.pages("ram", np.array([0], np.uint64), memory)  # the name has been said
    records, zero = encoder.nonzero_pages("ram", pages * np.uint64(4096), memory)
    assert (~zero).tolist() == touched
    rows = np.frombuffer(bytes(records), np.uint8).reshape(-1, PAGE_RECORD_BYTES)
    expected = pages[np.array(touched, np.bool_)].astype(np.int64)
    assert len(rows) == len(expected)
    assert (rows[:, 8:] == memory[expected]).all()
    assert (rows[:, :8].copy().view(">u8").ravel() >> 12).tolist() == expected.tolist()


def test_all_zero_gives_no_record():
    memory = np.zeros((4, 4096), np.uint8)
    records, zero = PageEncoder().nonzero_pages("ram", np.array([0, 4096], np.uint64), memory)
    assert not len(records)
    assert zero.all()
