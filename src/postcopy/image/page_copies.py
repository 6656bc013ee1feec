"""Copies of the pages of a working set, contiguous in one file, in the order of their first use.

In an image the pages of a working set are scattered, and each is checked with its whole chunk: eight times
as many bytes are read.  So a recording puts a copy of each page beside the image.  The copies are bound to
the image by its identity and have digests of their own: none is used unchecked.  They may be lost or
damaged without harm, since the image has all pages.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from blake3 import blake3

from postcopy.channel.whole_file import WholeFile
from postcopy.errors import ImageError, PostcopyError
from postcopy.image.base import PageRows
from postcopy.image.digests import DIGEST_BYTES, digest
from postcopy.image.file import ImageFile
from postcopy.image.file_kinds import PAGE_COPIES_MAGIC as _MAGIC
from postcopy.image.manifest_file import Fields, text_of
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Indices, index_runs

SUFFIX: Final = ".pages"
MOST_PAGES: Final = (256 << 20) // TARGET_PAGE_BYTES
"""The limit of the copies: of a larger working set they are the first pages."""

PIECE_PAGES: Final = 64
"""Pages that share a digest: 256 KiB, checked in 50 µs."""

_LENGTH_BYTES: Final = 8
_DIGEST_BYTES: Final = 32
_LARGEST_HEAD_BYTES: Final = 64 << 20
_UNKNOWN, _GOOD, _BAD = 0, 1, 2


@dataclass(frozen=True, eq=False, slots=True)
class CopiedPages:
    """Pages of one block that follow one another in the file.

    :ivar pages: their numbers, ascending.
    """

    block: str
    pages: Indices


Read = Callable[[str, int, int], PageRows]
"""``read(block, first, count)`` returns pages of a block."""


def beside(working_set: Path) -> Path:
    """Return the path of the copies for a working set."""
    return working_set.with_name(working_set.name + SUFFIX)


def save(path: Path, identity: str, parts: Sequence[CopiedPages], read: Read) -> None:
    """Write copies of these pages, whole or not at all, for their owner only.

    :param identity: of the image.
    :raises OSError: they cannot be written; an existing file is unchanged.
    :raises Refused: there is something that is no regular file.
    """
    parts = _limited(parts)
    total = sum(len(part.pages) for part in parts)
    room = _head(identity, parts, bytes(-(-total // PIECE_PAGES) * DIGEST_BYTES))
    with WholeFile(path) as file:
        end, digests = len(room), b""
        for rows in _pieces(parts, read):
            digests += digest(rows.data)
            file.write_at(end, rows.data)
            end += rows.nbytes
        file.write_at(0, _head(identity, parts, digests))
        file.publish()


def _limited(parts: Sequence[CopiedPages]) -> list[CopiedPages]:
    room, found = MOST_PAGES, []
    for part in parts:
        pages = part.pages[:room]
        room -= len(pages)
        if len(pages):
            found.append(CopiedPages(part.block, pages))
    return found


def _pieces(parts: Sequence[CopiedPages], read: Read) -> Iterator[PageRows]:
    """Yield all pages in order, in pieces that have a digest each."""
    piece = np.empty((PIECE_PAGES, TARGET_PAGE_BYTES), np.uint8)
    filled = 0
    for part in parts:
        for start, end in index_runs(part.pages).tolist():
            page, left = int(part.pages[start]), end - start
            while left:
                count = min(left, PIECE_PAGES - filled)
                piece[filled : filled + count] = read(part.block, page, count)
                page, left, filled = page + count, left - count, filled + count
                if filled == PIECE_PAGES:
                    yield piece
                    filled = 0
    if filled:
        yield piece[:filled]


def _head(identity: str, parts: Sequence[CopiedPages], digests: bytes) -> bytes:
    body = json.dumps(
        {
            "image": identity,
            "parts": [_encode(part) for part in parts],
            "digests": text_of(digests),
        }
    ).encode()
    head = _MAGIC + len(body).to_bytes(_LENGTH_BYTES, "little") + body
    head += blake3(head).digest()
    return head + bytes(-len(head) % TARGET_PAGE_BYTES)


def _encode(part: CopiedPages) -> dict[str, Any]:
    steps = np.diff(part.pages, prepend=0).astype("<u4")
    return {
        "block": part.block,
        "count": len(part.pages),
        "steps": text_of(zlib.compress(steps.tobytes())),
    }


class PageCopies:
    """Copies that a recording has written.  Any thread may check them.

    :param blocks: the number of pages of each block of the image.
    :raises ImageError: there are none, or they are damaged, or of another image.
    """

    def __init__(self, path: Path, identity: str, blocks: Mapping[str, int]) -> None:
        self._file = ImageFile(path)
        try:
            start = self._read(path, identity, blocks)
        except BaseException:
            self._file.close()
            raise
        self._start = start
        self.address = self._file.address + start
        """The address of the first page in this process, for the kernel to copy from; the others follow."""
        self._verdicts = bytearray(len(self._digests) // DIGEST_BYTES)

    def _read(self, path: Path, identity: str, blocks: Mapping[str, int]) -> int:
        """Read the head; return the offset of the first copy in the file, in bytes."""
        fields, start = self._read_head(path)
        if fields.get("image", str) != identity:
            raise ImageError(path, "these are pages of another image")
        parts = fields.objects("parts")
        self.count = sum(each.count("count") for each in parts)
        if self.count > MOST_PAGES:
            raise fields.wrong(f"{self.count} pages; at most {MOST_PAGES} are taken")
        self.parts = [_part(each, blocks) for each in parts]
        self._digests = fields.raw("digests")
        pieces = -(-self.count // PIECE_PAGES)
        if len(self._digests) != pieces * DIGEST_BYTES:
            raise fields.wrong(f"{len(self._digests)} bytes of digests for {pieces} pieces")
        if self._file.size_bytes != start + self.count * TARGET_PAGE_BYTES:
            raise fields.wrong(f"{self._file.size_bytes} bytes with {self.count} pages")
        return start

    def _read_head(self, path: Path) -> tuple[Fields, int]:
        prefix = len(_MAGIC) + _LENGTH_BYTES
        begin = self._file.read(0, prefix).tobytes()
        length = int.from_bytes(begin[len(_MAGIC) :], "little")
        end = prefix + length
        if begin[: len(_MAGIC)] != _MAGIC or length > _LARGEST_HEAD_BYTES:
            raise ImageError(path, "these are no pages of a working set")
        head = self._file.read(0, end).tobytes()
        if self._file.read(end, _DIGEST_BYTES).tobytes() != blake3(head).digest():
            raise ImageError(path, "the head does not agree with its digest")
        try:
            fields = Fields(path, json.loads(head[prefix:]))
        except (ValueError, RecursionError) as error:
            raise ImageError(path, f"the head is no JSON: {error}") from error
        end += _DIGEST_BYTES
        return fields, end + -end % TARGET_PAGE_BYTES

    def good(self, first: int, count: int) -> int:
        """Check copies before their use; return how many from ``first`` on are good."""
        if self._file.current_bytes < self._file.size_bytes:
            return 0  # truncated since: the rest of its last page would read as zeros
        for piece in range(first // PIECE_PAGES, -(-(first + count) // PIECE_PAGES)):
            if not self._is_good(piece):
                return max(0, piece * PIECE_PAGES - first)
        return count

    def after(self, first: int) -> int:
        """Return the first copy behind those that share the digest of this one."""
        return (first // PIECE_PAGES + 1) * PIECE_PAGES

    def look_ahead(self, ended: Callable[[], bool]) -> None:
        """Check copies ahead of :meth:`good`.

        :param ended: whether to stop.
        """
        for piece in range(len(self._verdicts)):
            if ended():
                return
            self._is_good(piece)

    def _is_good(self, piece: int) -> bool:
        # Two threads may check a piece at once, with the same result: verdicts need no lock.
        if self._verdicts[piece] == _UNKNOWN:
            self._verdicts[piece] = _GOOD if self._is_whole(piece) else _BAD
        return self._verdicts[piece] == _GOOD

    def _is_whole(self, piece: int) -> bool:
        size = PIECE_PAGES * TARGET_PAGE_BYTES
        try:
            found = digest(self._file.read(self._start + piece * size, size))
        except PostcopyError:
            return False  # the pages are read from the image then
        return found == self._digests[piece * DIGEST_BYTES : (piece + 1) * DIGEST_BYTES]

    def close(self) -> None:
        """Close the file.  Harmless when closed."""
        self._file.close()


def _part(fields: Fields, blocks: Mapping[str, int]) -> CopiedPages:
    name, count = fields.get("block", str), fields.count("count")
    if name not in blocks or count > blocks[name]:
        raise fields.wrong(f"{count} pages of '{name}'")
    # Bounded: the bytes are hostile input.
    try:
        raw = zlib.decompressobj().decompress(fields.raw("steps"), count * 4 + 1)
    except zlib.error as error:
        raise fields.wrong(f"'steps' cannot be unpacked: {error}") from error
    if len(raw) != count * 4:
        raise fields.wrong(f"'{name}' has other than {count} pages")
    steps = np.frombuffer(raw, "<u4").astype(np.int64)
    pages = np.cumsum(steps)
    if count and (int(pages[-1]) >= blocks[name] or not steps[1:].all()):
        raise fields.wrong(f"pages of '{name}' that there are not, or twice")
    return CopiedPages(name, pages)
