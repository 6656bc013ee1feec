"""An image as the memory of a source: pages are read many at once, and none that is wrong is given out."""

import errno
import os
from contextlib import closing

import numpy as np
import pytest

from image.images import PAGE, flip, memory, write_image, write_manifest
from postcopy.errors import ImageError
from postcopy.lazy_restore.restore_image import RestoreImage
from postcopy.serve.saved_guest import SavedGuest

PAGES = 512


@pytest.fixture(params=["mapped-ram", "stream"])
def path(request, tmp_path):
    return write_image(tmp_path / "image", request.param, memory(PAGES))


@pytest.fixture(params=[True, False], ids=["manifest", "no-manifest"])
def saved(request, path):
    if request.param:
        write_manifest(path)
    return path


def first_block(opened, page_size=PAGE):
    return SavedGuest(opened, {"ram": page_size} if page_size > PAGE else {}).blocks()[0]


def test_every_page_is_what_it_was_however_they_are_asked_for(saved):
    truth, random = memory(PAGES)["ram"], np.random.default_rng(7)
    with closing(RestoreImage(saved)) as opened:
        block = first_block(opened)
        there = np.flatnonzero(block.has_data(0, PAGES))
        some = [there[random.random(len(there)) < share] for share in (0.02, 0.6)]
        for target in (there, there[:1], there[::40], *some):
            rows, places = block.gather(target)
            np.testing.assert_array_equal(rows[places], truth[target])
            assert rows.flags.c_contiguous
        for page in there.tolist():
            np.testing.assert_array_equal(block.page(page), truth[page])


def test_pieces_of_huge_pages_have_zeros_where_the_image_has_nothing(saved):
    truth = memory(PAGES)["ram"]
    with closing(RestoreImage(saved)) as opened:
        block = first_block(opened, 64 * PAGE)
        pieces = block.target_pages(np.array([1, 5]))
        rows, places = block.gather(pieces)
        np.testing.assert_array_equal(rows[places], truth[pieces])


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path):
        path = write_image(tmp_path / "image", "mapped-ram", memory(PAGES))
        write_manifest(path)
        return path

    @pytest.fixture
    def opened(self, path):
        with closing(RestoreImage(path)) as opened:
            yield opened

    def test_a_wrong_chunk_is_refused_by_name_and_its_neighbours_are_given(self, path, opened):
        truth, block = memory(PAGES)["ram"], first_block(opened)
        at = opened.image.place("ram").pages_offset
        there = np.flatnonzero(block.has_data(0, PAGES))
        bad = (there >= 160) & (there < 176)
        flip(path, (at + int(there[bad][0]) * PAGE) * 8 + 5)
        rows, places = block.gather(there[~bad])
        np.testing.assert_array_equal(rows[places], truth[there[~bad]])
        for target in (there, there[bad][-1:]):
            with pytest.raises(
                ImageError, match=r"block ram from offset 0xa0000 on .*; take the image"
            ):
                block.gather(target)

    def test_a_sector_that_cannot_be_read_matters_to_its_own_pages_alone(
        self, monkeypatch, path, opened
    ):
        del path
        truth, block = memory(PAGES)["ram"], first_block(opened)
        lost = opened.image.place("ram").pages_offset + 200 * PAGE
        read, reads = os.preadv, os.pread

        def preadv(fd, buffers, offset):
            if offset <= lost < offset + sum(map(len, buffers)):
                raise OSError(errno.EIO, "Input/output error")
            return read(fd, buffers, offset)

        def pread(fd, count, offset):
            if offset <= lost < offset + count:
                raise OSError(errno.EIO, "Input/output error")
            return reads(fd, count, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        monkeypatch.setattr(os, "pread", pread)
        there = np.flatnonzero(block.has_data(0, PAGES))
        others = there[(there < 192) | (there >= 208)]
        rows, places = block.gather(others)
        np.testing.assert_array_equal(rows[places], truth[others])
        with pytest.raises(ImageError, match="cannot be read"):
            block.gather(there)

    def test_a_file_that_was_cut_off_gives_what_is_left_of_it(self, path, opened):
        truth, block = memory(PAGES)["ram"], first_block(opened)
        there = np.flatnonzero(block.has_data(0, PAGES))
        os.truncate(path, opened.image.place("ram").pages_offset + 320 * PAGE)
        before = there[there < 320]
        rows, places = block.gather(before)
        np.testing.assert_array_equal(rows[places], truth[before])
        with pytest.raises(ImageError, match="cut off"):
            block.gather(there)
