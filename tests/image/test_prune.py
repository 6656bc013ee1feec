"""A store gives back what no image needs any more, and nothing that one does."""

import errno
import os

import numpy as np
import pytest

from image.images import flip, memory, open_below, take_image
from postcopy.errors import ImageError, Refused
from postcopy.image.formats import open_image
from postcopy.image.manifest import beside
from postcopy.image.store.pack import STORE_NAME
from postcopy.image.store.prune import prune
from postcopy.image.store.store import ChunkStore


def take(path, blocks, parent=None):
    """An image of chunks, as ``postcopy snapshot`` makes it."""
    take_image(path, "mapped-ram", blocks, compressed=True, parent=parent)
    return path


def remove(path):
    path.unlink()
    beside(path).unlink()


def holds(path, blocks):
    with open_image(path) as image:
        for name, rows in blocks.items():
            np.testing.assert_array_equal(image.read(name, 0, len(rows)), rows)


def size_of(store):
    return sum(each.stat().st_size for each in store.glob("*.pack"))


@pytest.fixture
def store(tmp_path):
    return tmp_path / STORE_NAME


@pytest.fixture
def chain(tmp_path):
    """Two images that share most of their memory, and what is in them."""
    first = memory(pages=400)
    second = {name: rows.copy() for name, rows in first.items()}
    second["ram"][:16] += 1
    monday = take(tmp_path / "monday", first)
    tuesday = take(tmp_path / "tuesday", second, monday)
    return {monday: first, tuesday: second}


def test_with_every_image_there_nothing_goes(chain, store):
    before = size_of(store)
    pruned = prune(store)
    assert set(pruned.images) == set(chain)
    assert (pruned.freed_bytes, size_of(store)) == (0, before)


@pytest.mark.parametrize("gone", [0, 1])
def test_what_only_a_removed_image_had_goes(chain, store, gone):
    paths = list(chain)
    remove(paths[gone])
    kept = paths[1 - gone]
    before = size_of(store)
    foreseen = prune(store, dry_run=True)
    assert size_of(store) == before
    pruned = prune(store)
    assert pruned == foreseen
    assert pruned.images == (kept,)
    assert pruned.freed_bytes or pruned.idle_bytes
    holds(kept, chain[kept])
    assert prune(store).freed_bytes == 0


def test_a_store_without_images_is_empty(chain, store):
    for path in chain:
        remove(path)
    assert prune(store).kept_bytes == 0
    assert size_of(store) == 0


def test_who_reads_meanwhile_reads_on(chain, store, monkeypatch):
    monday, tuesday = chain
    with open_image(monday) as image:
        image.read("ram", 0, 1)
        remove(tuesday)
        monkeypatch.setattr("postcopy.image.store.prune._DEAD_SHARE", 1 << 40)  # whatever it saves
        before = set(store.glob("*.pack"))
        prune(store)
        assert set(store.glob("*.pack")) != before
        for name, rows in chain[monday].items():
            np.testing.assert_array_equal(image.read(name, 0, len(rows)), rows)
    holds(monday, chain[monday])


def test_equal_chunks_in_two_packs_are_kept_once(tmp_path, store):
    blocks = memory(pages=100)
    path = take(tmp_path / "image", blocks)
    (pack,) = store.glob("*.pack")
    pack.with_name("copy.pack").write_bytes(pack.read_bytes())  # as two snapshots at a time may
    assert prune(store).freed_bytes > 0
    assert len(list(store.glob("*.pack"))) == 1
    holds(path, blocks)


def test_images_in_other_folders_are_known(chain, store, tmp_path):
    monday = next(iter(chain))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = memory(pages=300, seed=7)
    path = take(elsewhere / "image", other, monday)
    assert path.resolve() in prune(store).images
    holds(path, other)
    elsewhere.rename(tmp_path / "away")
    with pytest.raises(Refused, match=f"add --without {elsewhere}"):
        prune(store)
    pruned = prune(store, without=[elsewhere])
    assert set(pruned.images) == set(chain)
    assert pruned.freed_bytes > 0


def test_a_folder_may_have_any_name(chain, store):
    folder = store.parent / os.fsdecode(b"f\xff")
    folder.mkdir()
    monday, blocks = next(iter(chain.items()))
    take(folder / "image", blocks, monday)
    assert folder / "image" in prune(store).images
    holds(folder / "image", blocks)


def test_a_damaged_manifest_keeps_everything(chain, store):
    monday = next(iter(chain))
    before = size_of(store)
    flip(beside(monday), 800)
    with pytest.raises(ImageError, match="before you prune the store"):
        prune(store)
    assert size_of(store) == before


def test_a_damaged_pack_keeps_everything_and_no_other_stays_open(chain, store):
    damaged = min(store.glob("*.pack"))
    flip(damaged, damaged.stat().st_size * 8 - 1)
    before = size_of(store)
    with pytest.raises(ImageError, match=str(damaged)):
        prune(store)
    assert size_of(store) == before
    assert open_below(store) == []


def test_a_snapshot_that_the_disk_has_no_room_for_leaves_nothing_open(chain, store, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        take(store.parent / "wednesday", memory(pages=400, seed=2), next(iter(chain)))
    assert open_below(store.parent) == []


def test_no_pruning_while_a_snapshot_is_being_taken(chain, store):
    with (
        ChunkStore(store).held(),
        pytest.raises(Refused, match="a snapshot writes into"),
    ):
        prune(store)
    prune(store)


def test_only_a_store_is_pruned(tmp_path):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(Refused, match="no store of chunks"):
            prune(folder)
    assert list(tmp_path.iterdir()) == []
