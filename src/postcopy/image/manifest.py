"""The manifest beside an image, ``PATH.manifest.json``: digests of the image, its origin and its times.

It is written when the image is complete and before the image is published.  An image without a manifest
can be read, but changed bits in its pages cannot be detected.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from postcopy.channel.whole_file import write_whole
from postcopy.errors import ImageError
from postcopy.image.base import LARGEST_RAM_BYTES, ImageBlock
from postcopy.image.digests import (
    ALGORITHM,
    CHUNK_BYTES,
    DIGEST_BYTES,
    ChunkDigests,
    chunk_count,
)
from postcopy.image.disks import Disk, decode_disks, encode_disks
from postcopy.image.file_kinds import MANIFEST_SUFFIX
from postcopy.image.manifest_file import Fields, decode, encode, text_of, text_of_mask
from postcopy.memory.runs import Mask

VERSION: Final = 1
SUFFIX: Final = MANIFEST_SUFFIX
_NAME_BYTES: Final = 255
_PATH_BYTES: Final = 4096  # with the zero byte at its end
_IDENTITY: Final = re.compile("[0-9a-f]{64}")
ADDRESS_BYTES: Final = 32
"""Of the address of a chunk: a whole digest, since guests that distrust each other may share a store."""


@dataclass(frozen=True, slots=True)
class Times:
    """When the image was taken, and how long it took; ``None`` where the machine has not measured.

    :ivar created: UTC, ISO 8601.
    :ivar pause_us: how long the guest was stopped.
    :ivar longest_stall_us: the longest wait of one write of the guest afterwards.
    :ivar total_ms: from the command to the complete image.
    """

    created: str
    pause_us: int | None = None
    longest_stall_us: int | None = None
    total_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Parent:
    """The image whose store of chunks this one shares: its path relative to this one, its identity."""

    path: str
    identity: str


@dataclass(frozen=True, eq=False, slots=True)
class StoredBlock:
    """The memory of one block, chunk by chunk, in a store.

    :param present: the chunks that are not all zero.
    :param addresses: their addresses, in order, 32 bytes each.
    """

    present: Mask
    addresses: bytes


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """The memory of an image of chunks.

    :param store: the store's folder, relative to the folder of the image.
    """

    store: str
    blocks: Mapping[str, StoredBlock] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Manifest:
    """The contents of a manifest.

    :param form: the image's format.
    :param digests: of the image's file.
    :param stored: for the format ``chunks`` only.
    :param command: the command line of the QEMU that was saved, as a shell would split it.
    :param disks: those that were taken at the same moment.
    :param was_running: whether the guest runs after a restore, whatever its own state says: a guest that
        was stopped for its disks is ``paused`` in its image.
    """

    form: str
    machine: str
    blocks: tuple[ImageBlock, ...]
    digests: ChunkDigests
    times: Times
    parent: Parent | None = None
    stored: Stored | None = None
    command: str | None = None
    disks: tuple[Disk, ...] = ()
    was_running: bool | None = None

    @property
    def identity(self) -> str:
        """The identity of the image, to which working sets and children are bound."""
        if self.stored is None:
            return self.digests.identity
        return self.digests.identity_with(
            part for each in self.stored.blocks.values() for part in (each.present, each.addresses)
        )

    def save(self, image: Path, *, replacing: bool = True) -> None:
        """Write it beside the image.

        :param replacing: replace an existing manifest.
        :raises OSError: it cannot be written; an existing file is unchanged.
        :raises Refused: another file is there.
        """
        write_whole(beside(image), self.encode(), replacing=replacing)

    def encode(self) -> bytes:
        """Return the bytes of its file."""
        return encode(self._body())

    def _body(self) -> dict[str, Any]:
        stored = self.stored
        return {
            "postcopy_manifest": VERSION,
            "format": self.form,
            "machine": self.machine,
            "blocks": [asdict(block) for block in self.blocks],
            "parent": None if self.parent is None else asdict(self.parent),
            "times": asdict(self.times),
            "identity": self.identity,
            "file_bytes": self.digests.size_bytes,
            "chunk_bytes": CHUNK_BYTES,
            "digest": ALGORITHM,
            "present": text_of_mask(self.digests.present),
            "digests": self.digests.text,
            "stored": None if stored is None else _encode_stored(stored),
            "command": self.command,
            "disks": encode_disks(self.disks),
            "was_running": self.was_running,
        }

    @classmethod
    def load(cls, image: Path) -> "Manifest":
        """Read the manifest beside an image.

        :raises ImageError: there is none, or it is damaged or invalid.
        """
        fields = decode(beside(image))
        _check_version(fields)
        blocks = tuple(_block(each) for each in fields.objects("blocks"))
        manifest = cls(
            form=fields.get("format", str),
            machine=fields.get("machine", str),
            blocks=blocks,
            digests=_digests(fields),
            times=_times(fields.object("times")),
            parent=_parent(fields),
            stored=_stored(fields, blocks),
            command=fields.optional("command", str),
            disks=decode_disks(fields),
            was_running=fields.flag("was_running"),
        )
        _check_identity(fields, manifest)
        return manifest


def beside(image: Path) -> Path:
    """Return the path of the manifest of an image.

    :raises ImageError: no image can have that name.
    """
    if not image.name:
        raise ImageError(image, "a folder; give the path of an image")
    found = image.with_name(image.name + SUFFIX)
    if len(os.fsencode(found.name)) > _NAME_BYTES or len(os.fsencode(found)) >= _PATH_BYTES:
        raise ImageError(image, f"the name is too long, with '{SUFFIX}' behind it")
    return found


def _check_version(fields: Fields) -> None:
    version = fields.get("postcopy_manifest", int)
    if version != VERSION:
        raise fields.wrong(f"version {version}; only {VERSION} is known")
    if (algorithm := fields.get("digest", str)) != ALGORITHM:
        raise fields.wrong(f"digest '{algorithm}'; only {ALGORITHM} is known")
    if (size := fields.get("chunk_bytes", int)) != CHUNK_BYTES:
        raise fields.wrong(f"chunks of {size} bytes; only {CHUNK_BYTES} are known")


def _check_identity(fields: Fields, manifest: Manifest) -> None:
    try:
        identity = manifest.identity
    except ValueError as error:
        raise fields.wrong("'digests' is no base64") from error
    if identity != fields.get("identity", str) or not _IDENTITY.fullmatch(identity):
        raise fields.wrong("its digests are not those that it is named for")


def _block(fields: Fields) -> ImageBlock:
    size = fields.count("size_bytes")
    if size > LARGEST_RAM_BYTES:
        raise fields.wrong(f"a block of {size:#x} bytes")
    return ImageBlock(fields.get("name", str), size)


def _digests(fields: Fields) -> ChunkDigests:
    size = fields.count("file_bytes")
    present = fields.mask("present", chunk_count(size))
    text = fields.get("digests", str)
    length = 4 * -(-int(present.sum()) * DIGEST_BYTES // 3)
    if len(text) != length or not text.isascii():
        raise fields.wrong(f"{len(text)} characters of digests for {int(present.sum())} chunks")
    # Not computed again: the manifest's own digest has been checked.
    identity = fields.get("identity", str) if fields.optional("stored", dict) is None else None
    return ChunkDigests(size, present, text, identity)


def _times(fields: Fields) -> Times:
    return Times(
        fields.get("created", str),
        fields.optional("pause_us", int),
        fields.optional("longest_stall_us", int),
        fields.optional("total_ms", int),
    )


def _parent(fields: Fields) -> Parent | None:
    if fields.optional("parent", dict) is None:
        return None
    parent = fields.object("parent")
    return Parent(parent.path("path"), parent.get("identity", str))


def _encode_stored(stored: Stored) -> dict[str, Any]:
    blocks = [
        {
            "name": name,
            "present": text_of_mask(each.present),
            "addresses": text_of(each.addresses),
        }
        for name, each in stored.blocks.items()
    ]
    return {"store": stored.store, "blocks": blocks}


def _stored(fields: Fields, blocks: tuple[ImageBlock, ...]) -> Stored | None:
    if fields.optional("stored", dict) is None:
        return None
    stored = fields.object("stored")
    sizes = {block.name: block.size_bytes for block in blocks}
    found = {}
    for each in stored.objects("blocks"):
        name = each.get("name", str)
        if name not in sizes or name in found:
            raise fields.wrong(f"stored chunks of '{name}', which is no block, or twice")
        present = each.mask("present", chunk_count(sizes[name]))
        addresses = each.raw("addresses")
        if len(addresses) != int(present.sum()) * ADDRESS_BYTES:
            raise fields.wrong(f"'{name}' has chunks without an address, or addresses too many")
        found[name] = StoredBlock(present, addresses)
    if found.keys() != sizes.keys():
        raise fields.wrong("a block has no stored chunks")
    return Stored(stored.path("store"), found)
