"""The map of memory says of each run of pages what most of them are, and counts all of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.memory import memory_map
from postcopy.memory.memory_map import PendingLook, draw
from postcopy.memory.page_map import MISSING, PLACING, RECEIVED, REMOVED, REQUESTED
from postcopy.statistics import MAP_CELLS, MAP_STATES

LETTERS = "".join(MAP_STATES)


@given(
    st.lists(st.tuples(st.integers(1, 9000), st.sampled_from([1, 512])), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_the_counts_are_exact_and_the_cells_bounded(shapes, seed):
    random = np.random.default_rng(seed)
    blocks = [
        (f"b{n}", each, random.integers(0, len(LETTERS), size, np.uint8))
        for n, (size, each) in enumerate(shapes)
    ]
    found = draw(blocks, incoming=True)
    assert len(found.cells) == sum(cells for _, cells, _ in found.blocks) <= MAP_CELLS
    for code, name in enumerate(MAP_STATES.values()):
        expected = sum(int((codes == code).sum()) * each for _, each, codes in blocks)
        assert found.pages.get(name, 0) == expected
    assert [pages for _, _, pages in found.blocks] == [size * each for size, each in shapes]


@given(st.integers(1, 20_000), st.integers(0, 2**32))
def test_each_cell_is_that_of_its_pages(count, seed):
    """Against one page after the other."""
    random = np.random.default_rng(seed)
    codes = random.choice(
        np.array([0, 2, 3, 5], np.uint8), size=count, p=[0.5, 0.3, 0.1, 0.1]
    ).astype(np.uint8)
    codes[random.random(count) < 0.001] = memory_map.ASKED_FOR
    found = draw([("ram", 1, codes)], incoming=True)
    run = -(-count // (MAP_CELLS - 1))
    for cell, letter in enumerate(found.cells):
        part = codes[cell * run : (cell + 1) * run]
        shown = LETTERS.index(letter)
        if (part == memory_map.ASKED_FOR).any():
            assert shown == memory_map.ASKED_FOR
        else:
            assert (part == shown).sum() == np.bincount(part).max()


def test_a_source_tells_what_has_just_left_and_what_was_written_again():
    look = PendingLook()
    pending, data = np.ones(6, np.bool_), np.array([1, 1, 1, 1, 0, 0], np.bool_)
    assert look.codes(pending, data, passed=False).tolist() == [memory_map.SOURCE] * 6
    pending[:2] = False
    pending[5] = False
    on_its_way = [memory_map.ON_ITS_WAY] * 2 + [memory_map.SOURCE] * 3 + [memory_map.ON_ITS_WAY]
    assert look.codes(pending, data, passed=False).tolist() == on_its_way
    pending[:] = False
    pending[0] = True
    look.codes(pending, data, passed=True)
    assert look.codes(pending, data, passed=True).tolist() == [
        memory_map.DIRTY_AGAIN,
        *[memory_map.IN_PLACE] * 3,
        *[memory_map.ZERO] * 2,
    ]


@pytest.mark.parametrize(
    ("state", "letter"),
    [(MISSING, "s"), (REQUESTED, "a"), (PLACING, "w"), (RECEIVED, "i"), (REMOVED, "z")],
)
def test_a_destination_tells_what_its_page_map_says(state, letter):
    codes = memory_map.codes_of_page_map(np.full(5, state, np.uint8))
    assert draw([("ram", 1, codes)], incoming=True).cells == letter * 5
