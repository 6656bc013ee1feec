"""From the file that a machine has written to an image under its name, with its manifest."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from postcopy.errors import ImageError, MigrationCancelled, Refused
from postcopy.image.convert import skeleton, write_mapped
from postcopy.image.describe import describe, now
from postcopy.image.digests import take_digests
from postcopy.image.file import ImageFile
from postcopy.image.formats import Image, open_image
from postcopy.image.manifest import Manifest, Parent, Stored, Times, beside
from postcopy.image.options import Cost, Form, Wanted
from postcopy.image.publish import anew, partial, publish
from postcopy.image.store.pack import Packed, pack, store_of
from postcopy.image.store.prune import remember
from postcopy.image.store.store import ChunkStore

_NO_TIMES: Final = Times("")  # until all has been done that takes time


@dataclass(frozen=True, slots=True)
class Finished:
    """An image that has been published.

    :ivar data_bytes, zero_bytes: of the guest's memory, counted in pages.
    :ivar file_bytes: what the image's file takes on the disk.
    :ivar packed: what went into the store, if there is one.
    """

    manifest: Manifest
    ram_bytes: int
    data_bytes: int
    zero_bytes: int
    file_bytes: int
    packed: Packed | None = None


def check_parent(parent: Path) -> None:
    """Refuse a parent that has nothing to share.

    :raises Refused: its memory is in its file.
    :raises ImageError: it is damaged.
    """
    if Manifest.load(parent).stored is None:
        raise Refused(f"{parent} has no store of chunks to share; take it with --compress zstd")


def finish(
    path: Path, wanted: Wanted, cost: Cost, given_up: Callable[[], bool] = lambda: False
) -> Finished:
    """Make an image of the file that stands under the partial name.

    :param given_up: asked before it is published: whether nobody wants it any more.
    :raises MigrationCancelled: so it is.
    :raises ImageError: the machine has written something that is no image.
    :raises OSError: the disk is full, or broken.  Nothing stands under the name then.
    """
    packed = None
    with contextlib.ExitStack() as held:
        with open_image(partial(path)) as image:
            data = sum(int(image.has_data(block.name).sum()) for block in image.blocks) * 4096
            ram = image.ram_bytes
            if wanted.chunked:
                store, parent = _store(path, wanted)
                held.enter_context(store)
                held.enter_context(store.held())  # until a manifest names what is in it
                manifest, packed = _to_chunks(image, path, store, parent)
            else:
                manifest = _in_form(image, path, wanted.form)
        if given_up():
            raise MigrationCancelled("the snapshot was given up; the guest runs on")
        times = Times(now(), cost.pause_us, cost.longest_stall_us, cost.total_ms)
        replace(manifest, times=times).save(path)
        try:
            publish(path)
        except BaseException:
            beside(path).unlink(missing_ok=True)
            raise
    on_disk = path.stat().st_blocks * 512
    return Finished(Manifest.load(path), ram, data, ram - data, on_disk, packed)


def _in_form(image: Image, path: Path, form: Form) -> Manifest:
    if image.format != form:  # a stream of which pages at fixed places are wanted
        write_mapped(image, anew(path))
        anew(path).replace(partial(path))
        with open_image(partial(path)) as mapped:
            return describe(mapped, _NO_TIMES)
    return describe(image, _NO_TIMES)


def _store(path: Path, wanted: Wanted) -> tuple[ChunkStore, Parent | None]:
    if wanted.parent is None:
        return ChunkStore(store_of(path)), None
    older = Manifest.load(wanted.parent)
    if older.stored is None:
        raise ImageError(wanted.parent, "it has no store of chunks any more")
    parent = Parent(os.path.relpath(wanted.parent, path.parent), older.identity)
    return ChunkStore(wanted.parent.parent / older.stored.store), parent


def _to_chunks(
    image: Image, path: Path, store: ChunkStore, parent: Parent | None
) -> tuple[Manifest, Packed]:
    remember(store.folder, path.parent)
    blocks, packed = pack(image, store)
    anew(path).write_bytes(skeleton(image))
    with ImageFile(anew(path)) as file:
        digests = take_digests(file)
    anew(path).replace(partial(path))
    stored = Stored(os.path.relpath(store.folder, path.parent), blocks)
    return Manifest(
        "chunks",
        image.machine_name,
        tuple(image.blocks),
        digests,
        _NO_TIMES,
        parent,
        stored=stored,
    ), packed
