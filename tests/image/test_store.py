"""Images of chunks: each chunk once, zeros nowhere, and every link of a chain reads right by itself."""

import dataclasses
import os
import shutil
import stat
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard

from image.images import PAGE, devices, flip, memory, write_image, write_manifest
from postcopy.channel.whole_file import WholeFile
from postcopy.errors import ImageError
from postcopy.image.chunked import ChunkImage
from postcopy.image.convert import skeleton, write_mapped
from postcopy.image.digests import CHUNK_BYTES, digest, take_digests
from postcopy.image.file import ImageFile
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest, Stored, beside
from postcopy.image.store.pack import pack
from postcopy.image.store.store import ChunkStore
from postcopy.image.verify import find_damages, open_for_restore

NOISE = np.random.default_rng(5).bytes(CHUNK_BYTES)


def write_chunks(path, blocks, store="chunks"):
    """Make an image of chunks of memory."""
    whole = write_image(path.with_suffix(".whole"), "mapped-ram", blocks)
    with open_image(whole) as image, ChunkStore(path.parent / store) as chunks:
        stored, packed = pack(image, chunks)
        path.write_bytes(skeleton(image))
        plain = write_manifest(path.with_suffix(".whole"))
    manifest = dataclasses.replace(
        plain, form="chunks", digests=_digests(path), stored=Stored(store, stored)
    )
    manifest.save(path)
    whole.unlink()
    beside(whole).unlink()
    return packed


def _digests(path):
    with ImageFile(path) as file:
        return take_digests(file)


def assert_holds(path, blocks):
    with open_image(path) as image:
        for name, rows in blocks.items():
            np.testing.assert_array_equal(image.read(name, 0, len(rows)), rows)
            assert not rows[~image.has_data(name)].any()


def put(folder, *chunks):
    """Each chunk's address, and how many bytes it took."""
    with ChunkStore(folder) as store, store.intake() as intake:
        return intake.put(chunks)


def get(folder, address, length):
    """A chunk, as one reads it who has just opened the store."""
    with ChunkStore(folder) as store:
        return store.get(address, length)


def packs_of(folder):
    return list(folder.glob("*.pack"))


class TestStore:
    @pytest.fixture
    def store(self, tmp_path):
        with ChunkStore(tmp_path / "chunks") as store:
            yield store

    def test_a_chunk_comes_back(self, store):
        chunks = (b"x", NOISE, bytes(CHUNK_BYTES), b"ab" * 2048)
        for data, (address, written) in zip(chunks, put(store.folder, *chunks), strict=True):
            assert 0 < written <= len(data) + 64
            assert store.get(address, len(data)) == data
            assert get(store.folder, address, len(data)) == data

    def test_equal_chunks_are_kept_once_and_for_their_owner_alone(self, store):
        with store.intake() as intake:
            (address, written), again = intake.put([NOISE, NOISE])
        assert again == (address, 0)
        with store.intake() as intake:
            assert intake.put([NOISE]) == [(address, 0)]
        assert put(store.folder, NOISE) == [(address, 0)]
        (file,) = packs_of(store.folder)
        assert written < file.stat().st_size < written + 100
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700

    def test_many_threads_may_put_the_same(self, store):
        with store.intake() as intake, ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(intake.put, [[NOISE, b"x"], [b"x", NOISE]] * 20))
        assert sum(written > 0 for answer in answers for _, written in answer) == 2
        assert store.get(answers[0][0][0], CHUNK_BYTES) == NOISE

    @pytest.mark.parametrize("call", ["fsync", "link"])
    def test_nothing_is_left_when_the_disk_is_full(self, tmp_path, monkeypatch, call):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space"):
            put(tmp_path / "chunks", NOISE)
        monkeypatch.undo()
        assert [each for each in tmp_path.rglob("*") if each.is_file()] == []

    def test_a_chunk_that_is_gone_is_named(self, store):
        with pytest.raises(ImageError, match=r"the chunk 0{64} is not there any more"):
            store.get(bytes(32), 10)

    def test_each_flipped_bit_of_a_pack_is_found(self, tmp_path):
        data = bytes(range(64)) * 8
        ((address, _),) = put(tmp_path, data)
        (pack_file,) = packs_of(tmp_path)
        for bit in range(pack_file.stat().st_size * 8):
            flip(pack_file, bit)
            with pytest.raises(ImageError, match=str(pack_file)):
                get(tmp_path, address, len(data))
            flip(pack_file, bit)
        assert get(tmp_path, address, len(data)) == data

    def test_a_pack_that_is_cut_off_is_found(self, tmp_path):
        ((address, _),) = put(tmp_path, b"abc")
        (pack_file,) = packs_of(tmp_path)
        whole = pack_file.read_bytes()
        for length in range(len(whole)):
            pack_file.write_bytes(whole[:length])
            with pytest.raises(ImageError, match=str(pack_file)):
                get(tmp_path, address, 3)

    def test_a_damaged_pack_does_not_keep_others_from_being_read(self, tmp_path):
        ((lost, _),) = put(tmp_path, b"lost")
        (pack_file,) = packs_of(tmp_path)
        flip(pack_file, pack_file.stat().st_size * 8 - 1)
        ((kept, _),) = put(tmp_path, b"kept")
        assert get(tmp_path, kept, 4) == b"kept"
        with pytest.raises(ImageError, match=str(pack_file)):
            get(tmp_path, lost, 4)
        assert put(tmp_path, b"lost")[0][1] > 0, "what cannot be read is not there"

    def test_a_frame_that_claims_much_is_refused_before_memory_is_taken(self, store):
        bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
        assert len(bomb) < CHUNK_BYTES
        long, claiming = bytes(32), bytes(31) + b"x"
        with store.new_pack() as writer:
            writer.append([(claiming, bomb + digest(bomb)), (long, NOISE * 2)])
        with pytest.raises(ImageError, match="another length"):
            store.get(claiming, CHUNK_BYTES)
        with pytest.raises(ImageError, match="it claims 131072 bytes"):
            store.get(long, CHUNK_BYTES)

    def test_an_index_that_claims_much_is_refused_before_memory_is_taken(self, tmp_path):
        ((address, _),) = put(tmp_path, b"abc")
        (pack_file,) = packs_of(tmp_path)
        with pack_file.open("r+b") as file:
            file.seek(-32, os.SEEK_END)
            file.write(struct.pack("<QQ", 1 << 60, 8))
        with pytest.raises(ImageError, match="another length"):
            get(tmp_path, address, 3)


class TestImage:
    def test_everything_of_an_image_of_chunks_is_read(self, tmp_path):
        blocks = memory(pages=100, rom_pages=5)
        write_chunks(tmp_path / "image", blocks)
        assert_holds(tmp_path / "image", blocks)
        with open_image(tmp_path / "image") as image:
            assert isinstance(image, ChunkImage)
            assert list(image.devices) == devices()
            for first in range(0, 100, 7):
                for wanted in (1, 9, 16, 17, 100):
                    count = min(wanted, 100 - first)
                    np.testing.assert_array_equal(
                        image.read("ram", first, count), blocks["ram"][first : first + count]
                    )

    def test_zeros_are_free_and_equal_chunks_are_kept_once(self, tmp_path):
        blocks = {"ram": np.zeros((16 * 8, PAGE), np.uint8), "rom": np.zeros((16, PAGE), np.uint8)}
        blocks["ram"][0:32] = np.frombuffer(NOISE * 2, np.uint8).reshape(-1, PAGE)
        packed = write_chunks(tmp_path / "image", blocks)
        assert packed.zero_bytes == 7 * CHUNK_BYTES
        assert packed.new_bytes + packed.reused_bytes == 2 * CHUNK_BYTES
        assert len(packs_of(tmp_path / "chunks")) == 1

    def test_each_link_of_a_chain_of_20_reads_right_without_the_others(self, tmp_path):
        random = np.random.default_rng(9)
        blocks = memory(pages=200)
        history = []
        for number in range(20):
            for page in random.integers(0, 200, 5).tolist():
                blocks["ram"][page] = random.integers(0, 256, PAGE) * random.integers(0, 2)
            history.append({name: rows.copy() for name, rows in blocks.items()})
            packed = write_chunks(tmp_path / f"image{number}", blocks)
            assert number == 0 or packed.new_bytes <= 5 * CHUNK_BYTES
        for number, expected in enumerate(history):
            assert_holds(tmp_path / f"image{number}", expected)
        for number in (0, *range(2, 19)):
            (tmp_path / f"image{number}").unlink()
            beside(tmp_path / f"image{number}").unlink()
        for number in (1, 19):
            assert_holds(tmp_path / f"image{number}", history[number])

    def test_a_whole_image_has_no_damage(self, tmp_path):
        path = tmp_path / "image"
        write_chunks(path, memory())
        assert list(find_damages(path, Manifest.load(path))) == []
        image, manifest = open_for_restore(path)
        assert manifest is not None
        image.close()

    def test_a_damaged_chunk_is_never_served_and_named_in_words_of_memory(self, tmp_path):
        path = tmp_path / "image"
        write_chunks(path, memory())
        manifest = Manifest.load(path)
        address = manifest.stored.blocks["ram"].addresses[32:64]
        with ChunkStore(tmp_path / "chunks") as store:
            pack_file, offset, length = store.find(address)
        flip(pack_file.path, (offset + length // 2) * 8)
        (damage,) = find_damages(path, manifest)
        assert (damage.path, damage.offset) == (pack_file.path, offset)
        assert (damage.block, damage.block_offset) == ("ram", CHUNK_BYTES)
        with open_image(path) as image:
            image.read("ram", 0, 16)
            with pytest.raises(ImageError, match="block ram from offset 0x10000"):
                image.read("ram", 0, 17)

    def test_an_image_of_chunks_is_nothing_without_its_manifest(self, tmp_path):
        write_chunks(tmp_path / "image", memory())
        beside(tmp_path / "image").unlink()
        with pytest.raises(ImageError, match=r"manifest\.json: cannot be opened"):
            open_image(tmp_path / "image")

    def test_the_manifest_of_another_image_is_refused(self, tmp_path):
        write_chunks(tmp_path / "image", memory())
        write_chunks(tmp_path / "other", memory(pages=20))
        shutil.copy(beside(tmp_path / "other"), beside(tmp_path / "image"))
        with pytest.raises(ImageError, match="does not belong"):
            open_image(tmp_path / "image")


@pytest.mark.parametrize("form", ["stream", "mapped-ram"])
def test_an_image_can_be_written_anew_with_pages_at_fixed_places(tmp_path, form):
    blocks = memory(pages=3000)
    written = write_image(tmp_path / "image", form, blocks)
    with open_image(written) as image, WholeFile(tmp_path / "mapped") as file:
        write_mapped(image, file)
        file.publish()
    assert_holds(tmp_path / "mapped", blocks)
    with open_image(tmp_path / "mapped") as image:
        assert image.format == "mapped-ram"
        assert list(image.devices) == devices()
        np.testing.assert_array_equal(image.has_data("ram"), blocks["ram"].any(axis=1))
