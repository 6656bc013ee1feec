"""No bit of an image or its manifest can change unnoticed."""

import dataclasses
import json
import os
import stat

import numpy as np
import pytest

from image.images import PAGE, TIMES, flip, memory, open_below, write_image, write_manifest
from postcopy.errors import ImageError, StreamError
from postcopy.image.chunk_verifier import ChunkVerifier
from postcopy.image.digests import CHUNK_BYTES, take_digests
from postcopy.image.disks import Disk
from postcopy.image.file import ImageFile
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest, Parent, beside
from postcopy.image.manifest_file import encode
from postcopy.image.verify import find_damages, open_for_restore

FORMS = ("stream", "mapped-ram")


@pytest.fixture(params=FORMS)
def path(request, tmp_path):
    return write_image(tmp_path / "image", request.param, memory())


def damages(path):
    return list(find_damages(path, Manifest.load(path)))


def test_a_manifest_says_again_what_it_was_told(path):
    written = write_manifest(path)
    written = dataclasses.replace(written, parent=Parent("older", "00ff"))
    written.save(path)
    read = Manifest.load(path)
    for name in ("form", "machine", "blocks", "times", "parent", "identity"):
        assert getattr(read, name) == getattr(written, name)
    np.testing.assert_array_equal(read.digests.present, written.digests.present)
    assert read.digests.digests == written.digests.digests
    assert read.times == TIMES


def test_a_manifest_is_json_for_its_owner_alone(path):
    write_manifest(path)
    file = beside(path)
    assert json.loads(file.read_text())["machine"] == "microvm"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not list(path.parent.glob("*.partial"))


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(path, monkeypatch):
    old = write_manifest(path)

    def fail(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        dataclasses.replace(old, parent=Parent("new", "00ff")).save(path)
    assert Manifest.load(path).parent is None
    assert not list(path.parent.glob("*.partial"))


def test_a_whole_image_has_no_damage(path):
    write_manifest(path)
    assert damages(path) == []
    image, manifest = open_for_restore(path)
    assert manifest is not None
    image.close()


def test_an_image_without_a_manifest_can_be_restored(path):
    image, manifest = open_for_restore(path)
    assert manifest is None
    image.close()


def test_holes_have_no_digests(tmp_path):
    path = write_image(tmp_path / "image", "mapped-ram", memory(pages=4096))
    with path.open("r+b") as file:
        file.truncate(64 << 30)
    with ImageFile(path) as file:
        digests = take_digests(file)
    assert len(digests.present) == 1 << 20
    assert digests.present.sum() < 400


def test_each_bit_of_a_tiny_image_is_looked_at(tmp_path):
    path = write_image(tmp_path / "image", "stream", memory(pages=2, rom_pages=1))
    digests = write_manifest(path).digests
    raw = bytearray(path.read_bytes())
    assert digests.check(0, raw)
    missed = 0
    for at in range(len(raw)):
        for bit in range(8):
            raw[at] ^= 1 << bit
            missed += digests.check(0, raw)
            raw[at] ^= 1 << bit
    assert not missed


def test_a_flipped_bit_anywhere_in_an_image_is_found_where_it_is(path):
    write_manifest(path)
    size = path.stat().st_size
    with ImageFile(path) as file:
        data = file.read(0, size)
        dense = np.flatnonzero(data[:: max(1, size // 500)]) * max(1, size // 500)
    random = np.random.default_rng(3)
    places = {0, size - 1, *dense.tolist(), *random.integers(0, size, 100).tolist()}
    for at in sorted(places):
        bit = at * 8 + int(random.integers(8))
        flip(path, bit)
        (damage,) = damages(path)
        assert damage.offset <= at < damage.offset + damage.length_bytes
        flip(path, bit)
    assert damages(path) == []


def test_damage_in_memory_names_block_and_offset(path):
    write_manifest(path)
    with open_image(path) as image:
        page = int(np.flatnonzero(image.has_data("ram"))[-1])
        at = path.read_bytes().index(image.read("ram", page, 1).tobytes())
        start = at // CHUNK_BYTES * CHUNK_BYTES
        block, offset = image.locate(start, start + CHUNK_BYTES)
    flip(path, at * 8)
    (damage,) = damages(path)
    assert (damage.offset, damage.block, damage.block_offset) == (start, block, offset)
    assert str(damage.error()).startswith(f"{path}: ")
    assert f"block {block} from offset {offset:#x}" in str(damage.error())


def test_each_truncation_of_an_image_is_found(path):
    write_manifest(path)
    size = path.stat().st_size
    for end in (size - 1, size - 300, size // 2, 4096, 1):
        os.truncate(path, end)
        with pytest.raises(ImageError, match=f"cut off: {end} bytes of {size}"):
            damages(path)
        with pytest.raises(ImageError, match="cut off"):
            open_for_restore(path)


def test_something_added_to_an_image_is_found(path):
    write_manifest(path)
    with path.open("ab") as file:
        file.write(bytes(10))
    with pytest.raises(ImageError, match="10 bytes too long"):
        damages(path)


def test_each_bit_of_a_manifest_is_looked_at(tmp_path):
    path = write_image(tmp_path / "image", "stream", memory(pages=2, rom_pages=1))
    write_manifest(path)
    file = beside(path)
    for bit in range(file.stat().st_size * 8):
        flip(file, bit)
        with pytest.raises(ImageError, match="manifest is damaged"):
            Manifest.load(path)
        flip(file, bit)
    Manifest.load(path)


def test_each_truncation_of_a_manifest_is_found(tmp_path):
    path = write_image(tmp_path / "image", "stream", memory(pages=2, rom_pages=1))
    write_manifest(path)
    for end in range(beside(path).stat().st_size - 1, -1, -1):
        os.truncate(beside(path), end)
        with pytest.raises(ImageError, match=r"manifest|empty"):
            Manifest.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"postcopy_manifest": 2},
        {"digest": "crc32"},
        {"chunk_bytes": 1},
        {"chunk_bytes": True},
        {"file_bytes": -1},
        {"file_bytes": 1 << 70},
        {"file_bytes": 1 << 50},
        {"present": "AAAA"},
        {"present": "#"},
        {"digests": ""},
        {"blocks": [{"name": "ram", "size_bytes": 1 << 60}]},
        {"blocks": [1]},
        {"times": None},
        {"machine": 7},
        {"identity": "00"},
        {"stored": {"store": "s", "blocks": []}},
        {"stored": {"store": "s", "blocks": [{"name": "x", "present": "", "addresses": ""}]}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_manifest_that_agrees_with_itself_may_still_be_nonsense(path, change):
    write_manifest(path)
    body = json.loads(beside(path).read_text())
    del body["manifest_digest"]
    beside(path).write_bytes(encode(body | change))
    with pytest.raises(ImageError, match="makes no sense"):
        Manifest.load(path)


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", "x" * 256, "x/" * 1025])
def test_a_path_that_no_file_can_have_is_refused(path, name):
    manifest = write_manifest(path)
    dataclasses.replace(manifest, parent=Parent(name, "00ff")).save(path)
    with pytest.raises(ImageError, match="'path' is no path"):
        Manifest.load(path)


def test_a_disk_whose_name_is_no_path_is_damaged():
    assert "disk d: a\0b: embedded null byte" in Disk("d", "a\0b", "raw", 1, 1, 1).damage()


def test_nothing_is_read_behind_the_end_of_a_file(path):
    with ImageFile(path) as file:
        for start in (file.size_bytes, 1 << 62, 1 << 63, (1 << 64) - 1):
            assert len(file.read(start, 10)) == 0


def test_an_error_is_one_line_whatever_it_quotes(path):
    quoted = "a\nb\x1b[2J\udcff" + "c" * 9000
    for error in (ImageError(path, quoted, 3), StreamError(quoted, 3)):
        assert str(error).isprintable()
        assert len(str(error)) < 1000
        assert r"a\nb\x1b[2J\udcffccc" in str(error)


def test_a_restore_refuses_what_describes_the_machine(path):
    write_manifest(path)
    flip(path, (path.stat().st_size - 10) * 8)
    with pytest.raises(ImageError, match="do not agree with their digest"):
        open_for_restore(path)


def test_a_restore_refuses_a_damaged_stream_at_once(tmp_path):
    path = write_image(tmp_path / "image", "stream", memory())
    write_manifest(path)
    flip(path, 90_000 * 8)
    with pytest.raises(ImageError, match="block ram from offset"):
        open_for_restore(path)
    assert open_below(tmp_path) == []


class TestCheckedPages:
    @pytest.fixture
    def path(self, tmp_path):
        path = write_image(tmp_path / "image", "mapped-ram", memory(pages=64))
        write_manifest(path)
        return path

    def test_all_pages_of_a_whole_image_are_good(self, path):
        image, manifest = open_for_restore(path)
        with image:
            checked = ChunkVerifier(image, manifest)
            assert checked.good("ram", 0, 64).all()
            assert checked.is_good("rom", 3)
            assert checked.damages() == []

    def test_pages_of_a_damaged_chunk_are_bad_and_all_others_good(self, path):
        with open_image(path) as image:
            at = image.place("ram").pages_offset + 20 * PAGE
        flip(path, at * 8 + 3)
        image, manifest = open_for_restore(path)  # which a damaged page does not keep from opening
        with image:
            checked = ChunkVerifier(image, manifest)
            assert checked.good("ram", 3, 40).tolist() == [not 16 <= p < 32 for p in range(3, 43)]
            assert not checked.is_good("ram", 16)
            assert checked.is_good("ram", 15)
            (damage,) = checked.damages()
            assert (damage.block, damage.block_offset) == ("ram", 16 * PAGE)

    def test_chunks_are_checked_ahead_until_they_need_not_be(self, path):
        with open_image(path) as image:
            start = image.place("ram").pages_offset
        image, manifest = open_for_restore(path)
        wanted = np.zeros(64, np.bool_)
        wanted[0] = wanted[16:28] = wanted[32:64] = True
        turns = iter([False, False, True])
        with image:
            checked = ChunkVerifier(image, manifest)
            checked.look_ahead("ram", wanted, lambda: next(turns))
            for page in (0, 20, 40, 60):
                flip(path, (start + page * PAGE) * 8)
            # What has been found good is not looked at again.
            good = [checked.is_good("ram", page) for page in (0, 20, 40, 60)]
            assert good == [False, True, True, False]

    def test_pages_are_read_and_checked_from_one_copy(self, path):
        image, manifest = open_for_restore(path)
        wanted = np.array([3, 4, 17, 30, 35])
        with image:
            checked = ChunkVerifier(image, manifest)
            for _ in range(2):  # checked now, and known to be good
                rows, good = checked.read("ram", wanted)
                np.testing.assert_array_equal(
                    rows[wanted - 3], image.read("ram", 3, 33)[wanted - 3]
                )
                assert len(rows) == 33
                assert good.all()
            rows, good = checked.read("rom", np.array([3]))  # in the last chunk, which is shorter
            np.testing.assert_array_equal(rows, image.read("rom", 3, 1))
            assert good.all()

    def test_a_page_of_a_damaged_chunk_is_told_and_only_if_it_is_wanted(self, path):
        with open_image(path) as image:
            at = image.place("ram").pages_offset + 20 * PAGE
        flip(path, at * 8 + 3)
        image, manifest = open_for_restore(path)
        with image:
            checked = ChunkVerifier(image, manifest)
            assert checked.read("ram", np.array([15, 32]))[1].tolist() == [True, True]
            assert checked.damages() == []
            for _ in range(2):
                good = checked.read("ram", np.array([15, 16, 31, 32, 40]))[1]
                assert good.tolist() == [True, False, False, True, True]
            (damage,) = checked.damages()
            assert (damage.block, damage.block_offset) == ("ram", 16 * PAGE)

    def test_what_is_no_zero_any_more_is_bad(self, path):
        with open_image(path) as image:
            first = image.place("ram").pages_offset // CHUNK_BYTES
        flip(path, (first - 1) * CHUNK_BYTES * 8)  # between the list of blocks and the pages
        digests = Manifest.load(path).digests
        assert digests.present[first - 1 : first + 2].tolist() == [False, True, True]
        with ImageFile(path) as file:
            data = file.read((first - 1) * CHUNK_BYTES, 3 * CHUNK_BYTES)
            chunks = np.arange(first - 1, first + 2)
            assert digests.wrong(chunks, data, (first - 1) * CHUNK_BYTES) == [first - 1]
