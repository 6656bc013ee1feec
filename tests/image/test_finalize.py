"""What a machine has written becomes an image under its name, or nothing does."""

import os
import stat

import numpy as np
import pytest

from image.images import memory, take_image, write_image
from postcopy.channel.whole_file import is_partial, partial_name
from postcopy.errors import ImageError, Refused
from postcopy.image.finalize import check_parent, finalize
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest, beside
from postcopy.image.options import ImageOptions, SnapshotTimings
from postcopy.image.publish import check_free, reserved
from postcopy.image.verify import find_damages

COST = SnapshotTimings(0.0, pause_us=700, longest_stall_us=90)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "image"


@pytest.mark.parametrize("written", ["stream", "mapped-ram"])
@pytest.mark.parametrize(
    ("wanted", "form"),
    [(ImageOptions("mapped-ram"), "mapped-ram"), (ImageOptions(compressed=True), "chunks")],
    ids=["mapped-ram", "chunks"],
)
def test_what_was_written_becomes_what_is_wanted(path, written, wanted, form):
    blocks = memory()
    with reserved(path) as partial:
        write_image(partial, written, blocks)
        finished = finalize(path, partial, wanted, COST)
    data = sum(int(rows.any(axis=1).sum()) for rows in blocks.values()) * 4096
    assert (finished.data_bytes, finished.data_bytes + finished.zero_bytes) == (data, 52 * 4096)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    manifest = Manifest.load(path)
    assert (manifest.form, manifest.times.pause_us, manifest.times.longest_stall_us) == (
        form,
        700,
        90,
    )
    assert list(find_damages(path, manifest)) == []
    with open_image(path) as image:
        for name, rows in blocks.items():
            np.testing.assert_array_equal(image.read(name, 0, len(rows)), rows)
    assert not [each for each in path.parent.iterdir() if is_partial(each)]


def test_a_stream_may_stay_one(path):
    written = write_image(partial_name(path), "stream", memory())
    assert finalize(path, written, ImageOptions("stream"), COST).manifest.form == "stream"


def test_what_is_no_image_is_not_published(path):
    with reserved(path) as written:
        written.write_bytes(b"QEVM\0\0\0\3 and so on")
        with pytest.raises(ImageError, match=str(written)):
            finalize(path, written, ImageOptions(), COST)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("meanwhile", ["a file", "a link", "the manifest"])
def test_what_has_got_the_name_meanwhile_stays(path, meanwhile):
    made = {
        "a file": lambda: path.write_bytes(b"another's"),
        "a link": lambda: path.symlink_to("nothing"),
        "the manifest": lambda: beside(path).write_bytes(b"another's"),
    }
    with reserved(path) as written:
        write_image(written, "mapped-ram", memory())
        made[meanwhile]()
        before = {each.name for each in path.parent.iterdir()} - {written.name}
        with pytest.raises(Refused, match="remove it, or give"):
            finalize(path, written, ImageOptions(), COST)
    assert {each.name for each in path.parent.iterdir()} == before - {f"{path.name}.partial.lock"}
    assert path.is_symlink() or b"another's" in {
        each.read_bytes() for each in path.parent.iterdir()
    }


def test_what_cannot_be_published_leaves_no_manifest(path, monkeypatch):
    written = write_image(partial_name(path), "mapped-ram", memory())
    link = os.link

    def fail(partial, name):
        if name == path:
            raise OSError(5, "Input/output error")
        link(partial, name)

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OSError, match="Input/output error"):
        finalize(path, written, ImageOptions(), COST)
    assert not path.exists()
    assert not beside(path).exists()


def test_a_parent_from_another_folder_shares_its_store(path, tmp_path):
    take_image(path, "mapped-ram", memory(), compressed=True)
    child = tmp_path / "deeper" / "child"
    child.parent.mkdir()
    finished = take_image(child, "stream", memory(), parent=path)
    assert finished.packed.new_bytes == 0
    manifest = Manifest.load(child)
    assert manifest.stored.store == "../postcopy-chunks"
    assert (manifest.parent.path, manifest.parent.identity) == (
        "../image",
        Manifest.load(path).identity,
    )
    assert [each.name for each in child.parent.iterdir() if each.is_dir()] == []


def test_what_cannot_come_to_a_good_end_is_refused_beforehand(path, tmp_path):
    with pytest.raises(Refused, match="is no folder"):
        check_free(tmp_path / "nowhere" / "image")
    take_image(path, "mapped-ram", memory())
    with pytest.raises(Refused, match="exists"):
        check_free(path)
    with pytest.raises(Refused, match="no store of chunks to share"):
        check_parent(path)
