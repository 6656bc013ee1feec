"""The working set: the pages that a guest touched first in earlier restores of an image.

It is a set without an order: the pages are the same from one restore to the next, their order is not
(:mod:`postcopy.image.page_copies` keeps which pages were among the first).  The file lies beside the image
and is bound to its identity: the working set of another image would be useless.
"""

import base64
import binascii
import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from postcopy.channel.whole_file import write_whole
from postcopy.errors import ImageError, KernelError, PostcopyError, Refused, on_one_line
from postcopy.image.file import open_regular
from postcopy.image.file_kinds import WORKING_SET_SUFFIX
from postcopy.kernel.patience import persist
from postcopy.memory.runs import Mask

SUFFIX: Final = WORKING_SET_SUFFIX
_VERSION: Final = 1
_EDGE_BYTES: Final = 64 << 10
_LARGEST_FILE_BYTES: Final = 64 << 20
_NONSENSE: Final = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,  # JSON may have an infinite number of restores
    RecursionError,
    zlib.error,
)


class BadWorkingSet(Refused):
    """The file is no working set, or one of another image; it is not used."""


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Pages of 4 KiB by block, of one image.

    :ivar identity: of the image: see :func:`identity_of`.
    :ivar restores: the number of restores that were recorded.
    """

    identity: str
    pages: Mapping[str, Mask]
    restores: int = 1

    @property
    def count(self) -> int:
        """The number of its pages."""
        return sum(int(mask.sum()) for mask in self.pages.values())

    def united(self, other: "WorkingSet") -> "WorkingSet":
        """Return the union with the working set of other restores.

        :raises BadWorkingSet: they are of different images.
        """
        if other.identity != self.identity:
            raise BadWorkingSet("the working sets are of different images; record it again")
        pages = {name: mask | other.pages[name] for name, mask in self.pages.items()}
        return WorkingSet(self.identity, pages, self.restores + other.restores)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all, for its owner only.

        :raises Refused: it cannot be written.
        """
        blocks = {name: _encode(mask) for name, mask in self.pages.items()}
        text = json.dumps(
            {
                "version": _VERSION,
                "image": self.identity,
                "restores": self.restores,
                "blocks": blocks,
            }
        )
        try:
            write_whole(path, text.encode())
        except OSError as error:
            raise Refused(f"working set {path} cannot be written: {error.strerror}") from error
        except Refused as error:
            raise Refused(f"working set {path} cannot be written: {error}") from error


def load(path: Path, identity: str, blocks: Mapping[str, int]) -> WorkingSet | None:
    """Read the working set of an image; None if none has been recorded.

    :param blocks: name and number of pages of each block of the image.
    :raises BadWorkingSet: the file cannot be read, is no working set, or of another image.
    """
    try:
        if not path.exists():
            return None
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size  # as much is reserved before anything is read
            raw = file.read(min(size, _LARGEST_FILE_BYTES) + 1)
    except OSError as error:
        raise BadWorkingSet(f"working set {path} cannot be read: {error.strerror}") from error
    except KernelError as error:
        raise BadWorkingSet(f"working set {path} cannot be read: {error}") from error
    except ImageError as error:
        raise BadWorkingSet(f"working set {error}; remove it, and record it again") from error
    try:
        return _parse(raw, identity, blocks)
    except _NONSENSE as error:
        why = on_one_line(str(error))
        raise BadWorkingSet(f"{path} is no working set: {why}; record it again") from error
    except BadWorkingSet as error:
        why = on_one_line(str(error))
        raise BadWorkingSet(f"working set {path} {why}; record it again") from error


def identity_of(path: Path) -> str:
    """Compute an identity of an image without a manifest, in the same time for any size.

    It covers the end of the file, where the devices' state lies: the clock and the registers of one point
    in time, which no other image has.  A copy of the file has the same identity.

    :raises Refused: the file cannot be read.
    """
    import hashlib  # imported late: not needed with a manifest

    digest = hashlib.blake2b(digest_size=32)
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            for start in (0, max(0, size - _EDGE_BYTES)):
                file.seek(start)
                digest.update(file.read(_EDGE_BYTES))
    except OSError as error:
        raise Refused(f"image {path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def beside(image: Path) -> Path:
    """Return the path of the working set of an image."""
    return image.with_name(image.name + SUFFIX)


def record(path: Path, seen: WorkingSet) -> WorkingSet:
    """Add the pages of one restore to the file, and return the union.

    A file of another image, or one that cannot be read, is replaced.

    :raises PostcopyError: the file cannot be written.
    """
    blocks = {name: len(mask) for name, mask in seen.pages.items()}
    with _one_at_a_time(path.with_name(path.name.removesuffix(SUFFIX))):
        try:
            before = load(path, seen.identity, blocks)
        except PostcopyError:
            before = None
        whole = seen if before is None else before.united(seen)
        whole.save(path)
    return whole


@contextlib.contextmanager
def _one_at_a_time(image: Path) -> Iterator[None]:
    """Serialise recordings of one image, so that none loses the pages of another.

    A recording does not wait for one that hangs: then the file is valid, and lacks some pages.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError, PostcopyError):
            fd = open_regular(image)
            held.callback(os.close, fd)
            persist(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _encode(mask: Mask) -> dict[str, Any]:
    packed = zlib.compress(np.packbits(mask, bitorder="little").tobytes())
    return {"pages": len(mask), "bitmap": base64.b64encode(packed).decode()}


def _parse(raw: bytes, identity: str, blocks: Mapping[str, int]) -> WorkingSet:
    if len(raw) > _LARGEST_FILE_BYTES:
        raise BadWorkingSet("is too large to be one")
    found = json.loads(raw)
    if found["version"] != _VERSION:
        raise BadWorkingSet(f"is of version {found['version']!r}, this is {_VERSION}")
    if found["image"] != identity:
        raise BadWorkingSet("belongs to another image")
    sizes = {name: block["pages"] for name, block in found["blocks"].items()}
    if sizes != dict(blocks):
        raise BadWorkingSet("has other blocks than the image")
    pages = {name: _decode(found["blocks"][name]["bitmap"], blocks[name]) for name in blocks}
    return WorkingSet(identity, pages, int(found["restores"]))


def _decode(text: str, pages: int) -> Mask:
    length = -(-pages // 8)
    try:
        packed = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise BadWorkingSet("has a bitmap that is no base64") from error
    # Bounded: the bytes are hostile input.
    bits = zlib.decompressobj().decompress(packed, length + 1)
    if len(bits) != length:
        raise BadWorkingSet(f"has a bitmap of another size than {length} bytes")
    unpacked = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
    mask: Mask = unpacked[:pages].astype(np.bool_)
    return mask
