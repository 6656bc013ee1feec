"""Remove from a store the chunks that no manifest names any more.

An image may lie anywhere, so a store keeps the names of the folders in which images of it have been made;
every manifest there is read.  If a folder or a manifest cannot be read, nothing is removed.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from postcopy.channel.whole_file import remove_all_leftovers, write_whole
from postcopy.errors import ImageError, Refused
from postcopy.image.manifest import ADDRESS_BYTES, SUFFIX, Manifest
from postcopy.image.store.pack_file import Addresses, PackFile, as_addresses
from postcopy.image.store.store import ChunkStore, address_of
from postcopy.memory.runs import Mask

_FOLDER_SUFFIX: Final = ".folder"
_DEAD_SHARE: Final = 4
"""A pack is rewritten when at least a quarter of it is unused; to rewrite more would free little."""


@dataclass(frozen=True, slots=True)
class PruneResult:
    """The figures of one run.

    :ivar images: those that use the store.
    :ivar kept_bytes, freed_bytes: of chunks, as they lie in the store.
    :ivar idle_bytes: unused too, but too few in a pack for it to be rewritten.
    """

    store: Path
    images: tuple[Path, ...]
    kept_bytes: int = 0
    freed_bytes: int = 0
    idle_bytes: int = 0


def note_folder(store: Path, folder: Path) -> None:
    """Note in a store that a folder has images of it.

    :raises OSError: the disk is full, or broken.
    """
    where = os.fsencode(os.path.relpath(folder, store))
    note = store / f"{address_of(where).hex()[:16]}{_FOLDER_SUFFIX}"
    if not note.exists():
        write_whole(note, where)


def find_store(path: Path) -> Path:
    """Return the store at a path, or the store of the image at the path.

    :raises Refused: the image has no store.
    :raises ImageError: the manifest of the image is missing or damaged.
    """
    if path.is_dir():
        return path
    stored = Manifest.load(path).stored
    if stored is None:
        raise Refused(f"{path} has all of its memory in its own file, and no store to prune")
    return (path.parent / stored.store).resolve()


def prune(folder: Path, *, without: Sequence[Path] = (), dry_run: bool = False) -> PruneResult:
    """Remove every chunk of a store that no image needs.

    Images can be read and opened meanwhile.

    :param without: folders in which there are no images any more.
    :param dry_run: remove nothing, only return the figures.
    :raises Refused: it is no store, a snapshot writes into it, or a folder is not there.
    :raises ImageError: a manifest, or a pack, is damaged; nothing has been removed.
    """
    store = ChunkStore(folder)
    if not store.exists:
        raise Refused(f"{folder} is no store of chunks; give one, or an image of one")
    with store, store.held(exclusive=True):
        images, used = _used(folder, {each.absolute().resolve() for each in without})
        store.open_new_packs()
        for error in store.damaged:
            raise error
        if not dry_run:
            remove_all_leftovers(folder)
        found = PruneResult(folder, tuple(images))
        kept = np.array([], f"S{ADDRESS_BYTES}")
        for pack in store.packs:
            live = np.isin(pack.addresses, used) & ~np.isin(pack.addresses, kept)
            kept = np.concatenate((kept, pack.addresses[live]))
            found = _prune_pack(store, pack, live, found, dry_run=dry_run)
    return found


def _prune_pack(
    store: ChunkStore, pack: PackFile, live: Mask, found: PruneResult, *, dry_run: bool
) -> PruneResult:
    """Remove the unused chunks of one pack; return the figures so far."""
    total = int(pack.lengths.sum(dtype=np.int64))
    kept = int(pack.lengths[live].sum(dtype=np.int64))
    dead = total - kept
    found = replace(found, kept_bytes=found.kept_bytes + kept)
    if not dead or dead * _DEAD_SHARE < total:
        return replace(found, idle_bytes=found.idle_bytes + dead)
    if not dry_run:
        with store.new_pack() as writer:
            pack.copy(live, writer)
        pack.path.unlink()  # last, so that one of the two is always there
    return replace(found, freed_bytes=found.freed_bytes + dead)


def _used(store: Path, without: set[Path]) -> tuple[list[Path], Addresses]:
    """The images of a store, and the addresses of all their chunks."""
    images, addresses = [], []
    for folder in _folders(store):
        if folder in without:
            continue
        if not folder.is_dir():
            raise Refused(
                f"images of this store were taken in {folder}, which is not there; if they are gone "
                f"for good, add --without {folder}"
            )
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            image = path.with_name(path.name.removesuffix(SUFFIX))
            found = _addresses(image, store)
            if found is not None:
                images.append(image)
                addresses.append(found)
    return images, as_addresses(b"".join(addresses))


def _addresses(image: Path, store: Path) -> bytes | None:
    """The addresses of an image's chunks; None if it does not use this store."""
    try:
        stored = Manifest.load(image).stored
    except ImageError as error:
        raise ImageError(
            error.path,
            f"{error.message}; repair it, or remove the image, before you prune the store",
        ) from error
    if stored is None or (image.parent / stored.store).resolve() != store.resolve():
        return None
    return b"".join(block.addresses for block in stored.blocks.values())


def _folders(store: Path) -> Iterator[Path]:
    yield store.parent.resolve()
    for note in sorted(store.glob(f"*{_FOLDER_SUFFIX}")):
        folder = (store / os.fsdecode(note.read_bytes())).resolve()
        if folder != store.parent.resolve():
            yield folder
