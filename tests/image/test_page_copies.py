"""Copies of the pages of a working set: what is kept comes back, checked, in the order of the wanting."""

import os
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import ImageError
from postcopy.image import page_copies
from postcopy.image.page_copies import PIECE_PAGES, CopiedPages, PageCopies

BLOCKS = {"ram": 1000, "rom": 3}
IMAGE = "ab" * 32
PAGE = 4096


def number(block, page):
    return page + (5000 if block == "rom" else 0)


def read(block, first, count):
    numbers = np.arange(number(block, first), number(block, first) + count, dtype=np.uint64)
    return np.repeat(numbers[:, None], PAGE // 8, axis=1).view(np.uint8)


def parts(*wanted):
    return [CopiedPages(name, np.array(pages, np.int64)) for name, pages in wanted]


WANTED = (("ram", [999]), ("rom", [0, 2]), ("ram", [0, 1, 2, 7, *range(100, 300)]), ("rom", []))


def saved(tmp_path, *wanted):
    path = tmp_path / "set.pages"
    page_copies.save(path, IMAGE, parts(*(wanted or WANTED)), read)
    return path


def opened(path):
    return PageCopies(path, IMAGE, BLOCKS)


def words(path, count):
    """The first word of each copy, as it stands at the end of the file."""
    return np.frombuffer(path.read_bytes()[-count * PAGE :], np.uint64)[:: PAGE // 8].tolist()


def test_what_is_kept_comes_back_in_order(tmp_path):
    path = saved(tmp_path)
    copies = opened(path)
    told = [(part.block, part.pages.tolist()) for part in copies.parts]
    assert told == [(name, pages) for name, pages in WANTED if pages]
    assert copies.count == 207
    assert copies.good(0, copies.count) == copies.count
    assert words(path, 207) == [number(name, page) for name, pages in WANTED for page in pages]
    assert copies.address % PAGE == 0
    copies.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_nothing_at_all_can_be_kept(tmp_path):
    copies = opened(saved(tmp_path, ("ram", [])))
    assert (copies.count, copies.parts) == (0, [])
    copies.look_ahead(lambda: False)
    copies.close()


def test_no_more_is_kept_than_the_first_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(page_copies, "MOST_PAGES", 4)
    copies = opened(saved(tmp_path))
    assert [part.pages.tolist() for part in copies.parts] == [[999], [0, 2], [0]]
    copies.close()


def test_a_flipped_bit_spoils_its_own_piece_only(tmp_path):
    path = saved(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[-(207 - PIECE_PAGES - 3) * PAGE] ^= 4
    path.write_bytes(raw)
    copies = opened(path)
    assert copies.good(0, 207) == PIECE_PAGES
    assert copies.good(PIECE_PAGES, 1) == 0
    assert copies.good(PIECE_PAGES + 9, 30) == 0
    assert copies.after(PIECE_PAGES) == copies.after(2 * PIECE_PAGES - 1) == 2 * PIECE_PAGES
    assert copies.good(2 * PIECE_PAGES, 207 - 2 * PIECE_PAGES) == 207 - 2 * PIECE_PAGES
    copies.close()


def test_what_is_checked_ahead_is_not_checked_again(tmp_path, monkeypatch):
    copies = opened(saved(tmp_path))
    looks = iter([False, False, True])
    copies.look_ahead(lambda: next(looks))
    taken = []
    monkeypatch.setattr(page_copies, "digest", lambda data: taken.append(len(data)) or b"")
    assert copies.good(0, 207) == 2 * PIECE_PAGES
    assert taken == [PIECE_PAGES * PAGE]
    copies.close()


def test_those_of_another_image_are_refused(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(ImageError, match="of another image"):
        PageCopies(path, "cd" * 32, BLOCKS)
    with pytest.raises(ImageError, match="pages of 'ram'"):
        PageCopies(path, IMAGE, {"ram": 100, "rom": 3})
    with pytest.raises(ImageError, match="pages of"):
        PageCopies(path, IMAGE, {"rom": 3})
    with pytest.raises(ImageError):
        opened(tmp_path / "none")


@given(st.data())
def test_no_byte_is_believed_unseen(tmp_path_factory, data):
    path = saved(tmp_path_factory.mktemp("copies"))
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - PAGE, at + 1]))])
    try:
        copies = opened(path)
    except ImageError:
        return
    head = len(raw) - 207 * PAGE
    assert copies.good(0, 207) < 207 or at < head  # only the padding of the head is nobody's
    copies.close()


def test_a_page_that_cannot_be_read_leaves_no_file(tmp_path):
    def fail(*_):
        raise ImageError("image", "cannot be read")

    with pytest.raises(ImageError):
        page_copies.save(tmp_path / "set.pages", IMAGE, parts(("ram", [1])), fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("pages", "why"),
    [([5, 5], "twice"), ([1000], "that there are not"), (range(2000), "2000 pages of")],
)
def test_pages_that_cannot_be_are_refused(tmp_path, pages, why):
    with pytest.raises(ImageError, match=why):
        opened(saved(tmp_path, ("ram", list(pages))))


@pytest.mark.parametrize("cut", [PAGE, 100])
def test_copies_that_are_cut_off_are_left_to_the_image(tmp_path, cut):
    path = saved(tmp_path)
    copies = opened(path)
    assert copies.good(0, copies.count) == copies.count
    os.truncate(path, path.stat().st_size - cut)
    assert copies.good(0, copies.count) == 0
    copies.close()
    with pytest.raises(ImageError, match="bytes with 207 pages"):
        opened(path)
