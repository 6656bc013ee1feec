"""Where the pages of a block come from: what is asked of a few pages agrees with what is asked of all."""

from types import SimpleNamespace

import numpy as np
import pytest

from image.images import PAGE, memory, write_image
from postcopy.image.digests import CHUNK_BYTES
from postcopy.image.formats import open_image
from postcopy.image.mapped_ram import MappedImage
from postcopy.lazy_restore.image_source import ImagePageSource

FORMS = ("mapped-ram", "stream")


@pytest.mark.parametrize("per_page", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_pages_with_data_are_told_one_by_one_in_windows_and_all_at_once(tmp_path, form, per_page):
    blocks = memory()
    path = write_image(tmp_path / "image", form, blocks)
    with open_image(path) as image:
        block = SimpleNamespace(name="ram", target_pages_per_page=per_page)
        source, whole = ImagePageSource(image, block), ImagePageSource(image, block).data.tolist()
        expected = blocks["ram"].any(axis=1).reshape(-1, per_page).any(axis=1)
        assert whole == expected.tolist()
        assert [source.has(page) for page in range(len(whole))] == whole
        for first, end in ((0, len(whole)), (3, 11), (8, 9), (7, 7)):
            assert source.has_data(first, end).tolist() == whole[first:end]
        assert PAGE * per_page * len(whole) == blocks["ram"].nbytes


PAGES = 1024
CHUNK_PAGES = CHUNK_BYTES // PAGE


class Foreign(MappedImage):
    """Not of our making: its pages may begin anywhere in the file."""

    def __init__(self, begin_page):
        self._begin = begin_page

    def place(self, _):
        return SimpleNamespace(pages_offset=self._begin * PAGE)

    def has_data(self, _):
        return np.ones(PAGES, np.bool_)

    def bits(self, _):
        return None

    def address(self, _):
        return 0

    def close(self):
        pass


@pytest.mark.parametrize("per_page", [1, 2 * CHUNK_PAGES, CHUNK_PAGES // 2])
@pytest.mark.parametrize("begin", [0, 3, CHUNK_PAGES])
@pytest.mark.parametrize("chunks", [{0}, {7}, {8}, {9, 10, 11}, {8, 11}, {63}])
def test_lost_are_those_pages_that_a_bad_chunk_reaches_into(per_page, begin, chunks):
    chunk_of = (np.arange(PAGES) + begin) // CHUNK_PAGES
    good = ~np.isin(chunk_of, list(chunks))
    check = SimpleNamespace(good=lambda _, first, count: good[first : first + count])
    source = ImagePageSource(
        Foreign(begin), SimpleNamespace(name="ram", target_pages_per_page=per_page), check
    )
    bad = np.flatnonzero(~good.reshape(-1, per_page).all(axis=1)).tolist()
    for page in bad:
        first, end = source.bad(page)
        assert first <= page < end
        assert set(range(first, end)) <= set(bad), (page, first, end)
    for chunk in chunks:
        if not len(reached := np.flatnonzero(chunk_of == chunk) // per_page):
            continue
        first, end = source.bad(int(reached[0]))
        assert first <= reached[0]
        assert end > reached[-1]


def test_one_that_cannot_be_read_takes_its_chunk_with_it():
    check = SimpleNamespace(good=lambda _, first, count: np.ones(count, np.bool_))
    block = SimpleNamespace(name="ram", target_pages_per_page=1)
    assert ImagePageSource(Foreign(3), block, check).bad(20) == (13, 29)
