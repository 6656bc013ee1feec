"""Readers of image files, and of the files beside them."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from blake3 import blake3

from fuzzing.mutations import mutated, mutated_json
from fuzzing.readers import Reader
from image.images import PAGE, stream_bytes, write_mapped
from image.test_libvirt import header
from image.test_store import write_chunks
from postcopy.errors import ImageError
from postcopy.image import manifest, working_set
from postcopy.image.device_fields import device_fields
from postcopy.image.digests import DIGEST_BYTES, digest
from postcopy.image.disks import Disk
from postcopy.image.extract import choose_ranges
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest
from postcopy.image.records import read_records
from postcopy.image.store.store import ChunkStore, address_of
from postcopy.image.verify import find_damages
from postcopy.image.working_set import BadWorkingSet, WorkingSet

READ_PAGES = 64
PIECE_BYTES = 64 << 10
ZEROS = bytes(PIECE_BYTES)
CHUNKS = [bytes([number]) * PIECE_BYTES for number in (1, 2, 3)] + [b"odd" * 900]
WORKING_SET_BLOCKS = {"ram": 100, "rom": 3}


def readers(folder: Path) -> Iterator[Reader]:
    """All of them; files are made in ``folder``."""
    stream = stream_bytes(_memory())
    yield _image(folder / "stream", [stream, stream_bytes(_memory(), described=False)], 12)
    yield _image(folder / "libvirt", [header() + stream, header(order=">") + stream], 8)
    write_mapped(folder / "seed", {"ram": _memory()["ram"]})
    yield _image(folder / "mapped-ram", [(folder / "seed").read_bytes()], 3)
    yield _manifest(folder / "described")
    yield from _chunks(folder / "chunked")
    yield _pack(folder / "packs")
    yield _working_set(folder / "working-set")


def _memory() -> dict[str, np.ndarray]:
    """Pages of one byte each: what else is in the file is worth to be changed."""
    blocks = {"ram": np.zeros((6, PAGE), np.uint8), "rom": np.zeros((2, PAGE), np.uint8)}
    blocks["ram"][[0, 1, 4]] = 0xA5
    blocks["rom"][1] = 0x5A
    return blocks


def write_sparse(path: Path, raw: bytes) -> None:
    """Write a file, without its pieces of zeros."""
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(raw), PIECE_BYTES):
            if (piece := raw[at : at + PIECE_BYTES]) != ZEROS[: len(piece)]:
                file.seek(at)
                file.write(piece)
        file.truncate(len(raw))


def _image(path: Path, seeds: list[bytes], share: int) -> Reader:
    def read(raw: bytes) -> None:
        write_sparse(path, raw)
        try:
            read_everything(path)
        except ImageError as error:
            assert str(path) in str(error)  # noqa: PT017 - no pytest runs it
            assert error.offset is not None or "device " in str(error)  # noqa: PT017
            raise

    return Reader(path.name, lambda chance: mutated(seeds, chance), read, (ImageError,), share)


def read_everything(path: Path) -> None:
    """Look at all that is in an image."""
    with open_image(path) as image:
        for block in image.blocks:
            assert len(image.has_data(block.name)) == block.pages
            count = min(READ_PAGES, block.pages)
            for first in {0, block.pages - count}:
                assert image.read(block.name, first, count).shape == (count, PAGE)
        image.locate(0, 1 << 40)
        list(image.damages())
        choose_ranges(image, None)
        list(device_fields(image))
    read_records(path, lambda _: None)


# Section: manifests


def _sealed(text: bytes) -> bytes:
    """A manifest as its writer would have sealed it."""
    return text + b', "manifest_digest": "%s"}\n' % blake3(text).hexdigest().encode()


def _changed_manifest(whole: bytes, chance: random.Random) -> bytes:
    body = json.loads(whole)
    del body["manifest_digest"]
    if chance.random() < 0.1:
        return mutated([whole], chance)
    if chance.random() < 0.3:
        return _sealed(mutated([json.dumps(body)[:-1].encode()], chance))
    return _sealed(json.dumps(mutated_json([body], chance))[:-1].encode())


def _manifest(folder: Path) -> Reader:
    folder.mkdir()
    image = folder / "image"
    image.write_bytes(stream_bytes(_memory()))
    _with_disks(image, "stream")
    path = manifest.beside(image)
    whole = path.read_bytes()

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        found = Manifest.load(image)
        assert len(found.identity) == 64
        list(find_damages(image, found))

    return Reader(
        "manifest", lambda chance: _changed_manifest(whole, chance), read, (ImageError,), 6
    )


def _with_disks(image: Path, form: str) -> None:
    from image.images import write_manifest

    made = write_manifest(image)
    disks = (Disk("disk0", "/no/such/disk", "qcow2", 1 << 30, 4096, 1, ("/below",)),)
    Manifest(
        form, made.machine, made.blocks, made.digests, made.times, disks=disks, was_running=True,
        command="qemu-system-x86_64 -M microvm", parent=manifest.Parent("parent", "0" * 64),
    ).save(image)  # fmt: skip


# Section: images of chunks


def _chunks(folder: Path) -> Iterator[Reader]:
    folder.mkdir()
    image = folder / "image"
    write_chunks(image, _memory())
    (pack,) = (folder / "chunks").glob("*.pack")
    for name, path in (("chunk-image", image), ("chunk-manifest", manifest.beside(image))):
        yield _chunk_file(name, path, image, share=3)
    yield _chunk_file("chunk-pack", pack, image, share=3)


def _chunk_file(name: str, path: Path, image: Path, share: int) -> Reader:
    whole = path.read_bytes()
    of_manifest = path == manifest.beside(image)

    def mutate(chance: random.Random) -> bytes:
        return _changed_manifest(whole, chance) if of_manifest else mutated([whole], chance)

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            read_everything(image)
            list(find_damages(image, Manifest.load(image)))
        finally:
            path.write_bytes(whole)

    return Reader(name, mutate, read, (ImageError,), share)


def _pack(folder: Path) -> Reader:
    with ChunkStore(folder) as store, store.intake() as intake:
        intake.put(CHUNKS)
    (path,) = folder.glob("*.pack")
    whole = path.read_bytes()

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        failures = []
        with ChunkStore(folder) as store:
            for data in CHUNKS:
                try:
                    assert store.get(address_of(data), len(data)) == data
                except ImageError as error:
                    failures.append(error)
        for error in failures:
            raise error

    return Reader("pack", lambda chance: _changed_pack(whole, chance), read, (ImageError,), 6)


def _changed_pack(whole: bytes, chance: random.Random) -> bytes:
    """Mostly with digests that agree: who writes a pack can compute them."""
    raw = bytearray(mutated([whole], chance))
    if chance.random() < 0.3 or len(raw) < 200:
        return bytes(raw)
    tail = 16 + DIGEST_BYTES
    count, start = 4, int.from_bytes(raw[-tail + 8 : -tail + 16], "little")
    if chance.random() < 0.5 and len(raw) == len(whole):  # an entry of the index is wrong
        at = start + count * 32 + chance.randrange(count * 12)
        raw[at : at + 4] = chance.randrange(1 << 32).to_bytes(4, "little")
    raw[-DIGEST_BYTES:] = digest(bytes(raw[start:-DIGEST_BYTES]))
    return bytes(raw)


# Section: working sets


def _working_set(path: Path) -> Reader:
    masks = {name: np.arange(pages) % 3 == 0 for name, pages in WORKING_SET_BLOCKS.items()}
    WorkingSet("ab" * 32, masks).save(path)
    whole = path.read_bytes()

    def mutate(chance: random.Random) -> bytes:
        if chance.random() < 0.3:
            return mutated([whole], chance)
        return json.dumps(mutated_json([json.loads(whole)], chance)).encode()

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        found = working_set.load(path, "ab" * 32, WORKING_SET_BLOCKS)
        sizes = {name: len(mask) for name, mask in found.pages.items()}
        assert sizes == WORKING_SET_BLOCKS
        found.united(found).save(path)

    return Reader("working-set", mutate, read, (BadWorkingSet,), 6)
