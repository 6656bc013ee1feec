"""Make an image, with its manifest and under its name, of the file that a machine has written."""

import contextlib
import datetime as dt
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from postcopy.channel.whole_file import WholeFile, kept, publish
from postcopy.errors import ImageError, Refused
from postcopy.image.convert import skeleton, write_mapped, write_stream
from postcopy.image.digests import ChunkDigests, take_digests
from postcopy.image.disks import FrozenDisks
from postcopy.image.file import ImageFile
from postcopy.image.formats import Image, open_image, open_unpacked
from postcopy.image.manifest import Manifest, Parent, Stored, Times, beside
from postcopy.image.options import ImageOptions, SnapshotTimings
from postcopy.image.publish import CommitPoint, never_cancelled, reserved
from postcopy.image.store.pack import Packed, pack, store_of
from postcopy.image.store.prune import note_folder
from postcopy.image.store.store import ChunkStore
from postcopy.stream.numbers import TARGET_PAGE_BYTES

NO_TIMES: Final = Times("")
"""Of a manifest that is not complete; the times are filled in after all work that takes time."""


@dataclass(frozen=True, slots=True)
class FinalizedImage:
    """An image that has been published.

    :ivar data_bytes, zero_bytes: of the guest's memory, counted in pages.
    :ivar file_bytes: the disk space of the image's file.
    :ivar packed: the figures of the store, if there is one.
    """

    manifest: Manifest
    ram_bytes: int
    data_bytes: int
    zero_bytes: int
    file_bytes: int
    packed: Packed | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What has been done while a machine wrote its file.

    :ivar digests: of the file that will be published.
    :ivar manifest, file, data_bytes: of a file that has been written anew; ``None``: the machine's own file
        is published.
    """

    digests: ChunkDigests
    manifest: Manifest | None = None
    file: WholeFile | None = None
    data_bytes: int = 0


def make_manifest(
    image: Image,
    times: Times,
    check: Callable[[], None] = never_cancelled,
    digests: ChunkDigests | None = None,
) -> Manifest:
    """Read all of an image, and make its manifest.

    :param check: called now and then; an exception of it ends the work.
    :param digests: of its file, if they have been taken.
    :raises ImageError: the file has gone.
    """
    if digests is None:
        with ImageFile(image.path) as file:
            digests = take_digests(file, check)
    return Manifest(image.format, image.machine_name, tuple(image.blocks), digests, times)


def utc_now() -> str:
    """Return the time of day in UTC, as manifests have it."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")


def check_parent(parent: Path) -> None:
    """Refuse a parent that has no chunks to share.

    :raises Refused: its memory is in its own file.
    :raises ImageError: it is damaged.
    """
    if Manifest.load(parent).stored is None:
        raise Refused(f"{parent} has no store of chunks to share; take it with --compress zstd")


def finalize(
    path: Path,
    written: Path,
    options: ImageOptions,
    timings: SnapshotTimings,
    commit_point: CommitPoint | None = None,
    disks: FrozenDisks | None = None,
    prepared: Prepared | None = None,
) -> FinalizedImage:
    """Make an image of the file that a machine has written.

    :param written: that file, beside ``path``; it may have gone afterwards.
    :param commit_point: until there the work may be cancelled.
    :param disks: those that were taken at the same moment.
    :param prepared: what has been done already.
    :raises MigrationCancelled: it was cancelled.
    :raises ImageError: the file that the machine has written is no image.
    :raises Refused: a file of that name has been made meanwhile.
    :raises OSError: the disk is full, or broken; no file has got the name.
    """
    commit_point = commit_point or CommitPoint()
    with contextlib.ExitStack() as held:
        sizes, manifest, file, packed = _made(
            path, written, options, held, commit_point.check, prepared
        )
        commit_point.commit()
        times = Times(utc_now(), timings.pause_us, timings.longest_stall_us, timings.total_ms)
        manifest = replace(manifest, times=times, command=options.command)
        if disks is not None:
            manifest = replace(manifest, disks=disks.disks, was_running=disks.was_running)
        publish_image(path, written if file is None else file.partial, manifest)
    return sizes.finalized(path, packed)


def _made(
    path: Path,
    written: Path,
    options: ImageOptions,
    held: contextlib.ExitStack,
    check: Callable[[], None],
    prepared: Prepared | None,
) -> "tuple[_Sizes, Manifest, WholeFile | None, Packed | None]":
    """Write the image anew if need be: sizes, manifest, the new file, and the figures of the store."""
    if prepared is not None and prepared.manifest is not None:
        ram = sum(block.size_bytes for block in prepared.manifest.blocks)
        return _Sizes(ram, prepared.data_bytes), prepared.manifest, prepared.file, None
    with open_image(written) as image, kept(written):
        sizes = _Sizes.of(image)
        if not options.chunked and image.format == options.form:
            digests = None if prepared is None else prepared.digests
            return sizes, make_manifest(image, NO_TIMES, check, digests), None, None
        return sizes, *_write(image, path, options, held, check)


def convert(source: Path, path: Path, options: ImageOptions) -> FinalizedImage:
    """Write an image anew, in any format, with a manifest; a file that libvirt has compressed is unpacked.

    The caller has verified it, if it has a manifest.

    :raises ImageError: the source is no image.
    :raises Refused: there is a file of that name.
    :raises OSError: the disk is full, or broken; no file has got the name.
    """
    with reserved(path), contextlib.ExitStack() as held:
        with open_unpacked(source, path.parent) as image:
            sizes = _Sizes.of(image)
            manifest, file, packed = _write(image, path, options, held, never_cancelled)
        manifest = _of_the_same_guest(source, replace(manifest, times=Times(utc_now())))
        publish_image(path, file.partial, manifest)
    return sizes.finalized(path, packed)


def _of_the_same_guest(source: Path, manifest: Manifest) -> Manifest:
    """Take over what only the source's manifest knows."""
    if not beside(source).exists():
        return manifest
    known = Manifest.load(source)
    return replace(
        manifest, command=known.command, disks=known.disks, was_running=known.was_running
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    ram_bytes: int
    data_bytes: int

    @classmethod
    def of(cls, image: Image) -> "_Sizes":
        data = sum(int(image.has_data(block.name).sum()) for block in image.blocks)
        return cls(image.ram_bytes, data * TARGET_PAGE_BYTES)

    def finalized(self, path: Path, packed: Packed | None) -> FinalizedImage:
        zero = self.ram_bytes - self.data_bytes
        on_disk = path.stat().st_blocks * 512
        manifest = Manifest.load(path)
        return FinalizedImage(manifest, self.ram_bytes, self.data_bytes, zero, on_disk, packed)


def _write(
    image: Image,
    path: Path,
    options: ImageOptions,
    held: contextlib.ExitStack,
    check: Callable[[], None],
) -> tuple[Manifest, WholeFile, Packed | None]:
    """Write an image in another format, to a file that has no name yet.

    :param held: what stays open until the file is published.
    """
    if options.chunked:
        store, parent = _store(path, options)
        held.enter_context(store)
        held.enter_context(store.held())  # until a manifest names the chunks
        file = held.enter_context(WholeFile(path))
        manifest, packed = _to_chunks(image, file, store, parent, check)
        return manifest, file, packed
    file = held.enter_context(WholeFile(path))
    write = write_mapped if options.form == "mapped-ram" else write_stream
    write(image, file, check)
    with open_image(file.partial) as written:
        return make_manifest(written, NO_TIMES, check), file, None


def publish_image(path: Path, written: Path, manifest: Manifest) -> None:
    """Give an image that is whole its name, with its manifest beside it.

    :param written: its file; it may have gone afterwards.
    :raises Refused: a file of that name has been made meanwhile.
    :raises OSError: the disk is full, or broken; no file has got the name.
    """
    manifest.save(path, replacing=False)
    try:
        publish(written, path)
    except BaseException:
        beside(path).unlink(missing_ok=True)
        raise


def _store(path: Path, options: ImageOptions) -> tuple[ChunkStore, Parent | None]:
    if options.parent is None:
        return ChunkStore(store_of(path)), None
    older = Manifest.load(options.parent)
    if older.stored is None:
        raise ImageError(options.parent, "it has no store of chunks any more")
    parent = Parent(os.path.relpath(options.parent, path.parent), older.identity)
    return ChunkStore(options.parent.parent / older.stored.store), parent


def _to_chunks(
    image: Image,
    file: WholeFile,
    store: ChunkStore,
    parent: Parent | None,
    check: Callable[[], None],
) -> tuple[Manifest, Packed]:
    folder = file.path.parent
    note_folder(store.folder, folder)
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
        NO_TIMES,
        parent,
        stored=stored,
    ), packed
