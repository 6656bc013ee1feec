"""Two commands that write the same file, or into the same store, at the same time."""

import os
import threading

import numpy as np
import pytest

from image.images import memory, take_image
from postcopy.channel.whole_file import partial_name
from postcopy.image import page_copies, working_set
from postcopy.image.manifest import Manifest
from postcopy.image.page_copies import CopiedPages, PageCopies
from postcopy.image.store.prune import prune
from postcopy.image.verify import find_damages
from postcopy.image.working_set import WorkingSet

IMAGE = "ab" * 32


@pytest.fixture
def at_each_sync(monkeypatch):
    """``at_each_sync(other)``: before the disk is to take a file for the first time, ``other`` runs."""

    def arm(other):
        sync, left = os.fsync, [other]

        def first_the_other(fd):
            if left:
                left.pop()()
            sync(fd)

        monkeypatch.setattr(os, "fsync", first_the_other)
        return left

    return arm


@pytest.fixture(autouse=True)
def nothing_half_written(tmp_path):
    yield
    assert not list(tmp_path.rglob("*.partial*"))


def test_the_first_snapshots_of_a_new_store(tmp_path, at_each_sync):
    """The note that there are images of it in this folder is the first file of either."""
    one, other = memory(seed=1), memory(seed=2)
    left = at_each_sync(lambda: take_image(tmp_path / "b", "stream", other, compressed=True))
    take_image(tmp_path / "a", "stream", one, compressed=True)
    assert not left
    for path in (tmp_path / "a", tmp_path / "b"):
        assert list(find_damages(path, Manifest.load(path))) == []
    assert len(prune(tmp_path / "postcopy-chunks").images) == 2


@pytest.mark.parametrize("image", ["there", "gone"])
def test_two_recordings_of_one_working_set(tmp_path, at_each_sync, image):
    """The second begins while the first is being written; what it adds to, it has read before or after."""
    path = tmp_path / "image.working-set"
    if image == "there":
        (tmp_path / "image").touch()

    def seen(page):
        mask = np.zeros(64, np.bool_)
        mask[page] = True
        return WorkingSet(IMAGE, {"ram": mask})

    second = threading.Thread(target=lambda: working_set.record(path, seen(1)))

    def begin():
        second.start()
        second.join(0.5)  # as far as it comes

    left = at_each_sync(begin)
    working_set.record(path, seen(2))
    second.join()
    assert not left
    found = working_set.load(path, IMAGE, {"ram": 64})
    pages = np.flatnonzero(found.pages["ram"]).tolist()
    assert pages == ([1, 2] if image == "there" else [2])


def test_two_recordings_of_the_copies(tmp_path, at_each_sync):
    path = tmp_path / "image.working-set.pages"

    def save(page):
        part = CopiedPages("ram", np.array([page], np.int64))
        page_copies.save(
            path, IMAGE, [part], lambda _block, first, count: np.full((count, 4096), first, "u1")
        )

    left = at_each_sync(lambda: save(1))
    save(2)
    assert not left
    copies = PageCopies(path, IMAGE, {"ram": 64})
    assert copies.good(0, 1) == 1
    assert copies.parts[0].pages.tolist() == [2]
    copies.close()


def test_pruning_removes_what_killed_commands_have_left(tmp_path):
    take_image(tmp_path / "a", "stream", memory(), compressed=True)
    store = tmp_path / "postcopy-chunks"
    left = partial_name(store / "0123.pack")
    left.touch()
    prune(store, dry_run=True)
    assert left.exists()
    prune(store)
    assert not left.exists()
