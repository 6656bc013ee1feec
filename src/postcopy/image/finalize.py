"""From the file that a machine has written to an image under its name, with its manifest."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from postcopy.channel.whole_file import WholeFile, kept, publish
from postcopy.errors import ImageError, Refused
from postcopy.image.convert import skeleton, write_mapped
from postcopy.image.describe import describe, now
from postcopy.image.digests import take_digests
from postcopy.image.file import ImageFile
from postcopy.image.formats import Image, open_image
from postcopy.image.last_moment import LastMoment
from postcopy.image.manifest import Manifest, Parent, Stored, Times, beside
from postcopy.image.options import Cost, Wanted
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
    path: Path,
    written: Path,
    wanted: Wanted,
    cost: Cost,
    last_moment: LastMoment | None = None,
) -> Finished:
    """Make an image of the file that a machine has written.

    :param written: that file, beside ``path``; it may have gone afterwards.
    :param last_moment: until when it may be given up.
    :raises MigrationCancelled: it was.
    :raises ImageError: the machine has written something that is no image.
    :raises Refused: something has got the name meanwhile.
    :raises OSError: the disk is full, or broken.  Nothing stands under the name then.
    """
    packed = None
    last_moment = last_moment or LastMoment()
    check = last_moment.check
    with contextlib.ExitStack() as held:
        with open_image(written) as image, kept(written):
            data = sum(int(image.has_data(block.name).sum()) for block in image.blocks) * 4096
            ram = image.ram_bytes
            file = None  # in another form than the machine has written
            if wanted.chunked:
                store, parent = _store(path, wanted)
                held.enter_context(store)
                held.enter_context(store.held())  # until a manifest names what is in it
                file = held.enter_context(WholeFile(path))
                manifest, packed = _to_chunks(image, file, store, parent, check)
            elif image.format != wanted.form:  # a stream: pages at fixed places are wanted
                file = held.enter_context(WholeFile(path))
                write_mapped(image, file, check)
                with open_image(file.partial) as mapped:
                    manifest = describe(mapped, _NO_TIMES, check)
            else:
                manifest = describe(image, _NO_TIMES, check)
        last_moment.decide()
        times = Times(now(), cost.pause_us, cost.longest_stall_us, cost.total_ms)
        _publish(path, written if file is None else file.partial, replace(manifest, times=times))
    on_disk = path.stat().st_blocks * 512
    return Finished(Manifest.load(path), ram, data, ram - data, on_disk, packed)


def _publish(path: Path, written: Path, manifest: Manifest) -> None:
    manifest.save(path, replacing=False)
    try:
        publish(written, path)
    except BaseException:
        beside(path).unlink(missing_ok=True)
        raise


def _store(path: Path, wanted: Wanted) -> tuple[ChunkStore, Parent | None]:
    if wanted.parent is None:
        return ChunkStore(store_of(path)), None
    older = Manifest.load(wanted.parent)
    if older.stored is None:
        raise ImageError(wanted.parent, "it has no store of chunks any more")
    parent = Parent(os.path.relpath(wanted.parent, path.parent), older.identity)
    return ChunkStore(wanted.parent.parent / older.stored.store), parent


def _to_chunks(
    image: Image,
    file: WholeFile,
    store: ChunkStore,
    parent: Parent | None,
    check: Callable[[], None],
) -> tuple[Manifest, Packed]:
    folder = file.path.parent
    remember(store.folder, folder)
    blocks, packed = pack(image, store, check)
    file.write_at(0, skeleton(image))
    with ImageFile(file.partial) as written:
        digests = take_digests(written, check)
    stored = Stored(os.path.relpath(store.folder, folder), blocks)
    return Manifest(
        "chunks",
        image.machine_name,
        tuple(image.blocks),
        digests,
        _NO_TIMES,
        parent,
        stored=stored,
    ), packed
