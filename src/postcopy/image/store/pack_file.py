"""A file of many chunks: a *pack*.  One snapshot writes one, whole or not at all; it is never changed.

    PCPACK01   frame frame ...   index   tail

A frame is one chunk, compressed by zstd, with a digest of the frame behind it: a decompressor ignores some
bits of a frame, and every flipped bit must be found.  The index has all addresses, ascending, then all
offsets, then all lengths; the tail has their number, the offset of the index, and a digest of index and
tail.  Numbers are little-endian.
"""

import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.channel.whole_file import WholeFile
from postcopy.errors import ImageError
from postcopy.image.digests import CHUNK_BYTES, DIGEST_BYTES, digest
from postcopy.image.file import ImageFile
from postcopy.image.file_kinds import PACK_MAGIC as _MAGIC
from postcopy.image.manifest import ADDRESS_BYTES
from postcopy.memory.runs import Mask

SUFFIX: Final = ".pack"
LONGEST_FRAME_BYTES: Final = CHUNK_BYTES + 1024
"""A chunk that cannot be compressed grows by a head and a digest."""

_TAIL: Final = struct.Struct("<QQ")
_TAIL_BYTES: Final = _TAIL.size + DIGEST_BYTES
_ENTRY_BYTES: Final = ADDRESS_BYTES + 8 + 4

Addresses = npt.NDArray[np.bytes_]
"""Addresses of chunks as an array that numpy can compare and sort; all have the same length."""


def as_addresses(raw: bytes) -> Addresses:
    """Make an array of concatenated addresses."""
    return np.frombuffer(raw, f"S{ADDRESS_BYTES}")


class PackFile:
    """A pack, open for reading; it may be removed meanwhile.  For any thread.

    :raises ImageError: the file is no pack, or its index is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = ImageFile(path)
        try:
            self._read_index()
        except BaseException:
            self.close()
            raise

    def _read_index(self) -> None:
        size = self._file.size_bytes
        tail = self._file.read(max(0, size - _TAIL_BYTES), _TAIL_BYTES).tobytes()
        begin = self._file.read(0, len(_MAGIC)).tobytes()
        if len(tail) < _TAIL_BYTES or begin != _MAGIC:
            raise self.fail("it is no pack of chunks, or cut off")
        count, start = _TAIL.unpack_from(tail)
        if start < len(_MAGIC) or start + count * _ENTRY_BYTES != size - _TAIL_BYTES:
            raise self.fail("the index is damaged: it has another length", size - _TAIL_BYTES)
        index = self._file.read(start, count * _ENTRY_BYTES).tobytes()
        if digest(index + tail[: _TAIL.size]) != tail[_TAIL.size :]:
            raise self.fail("the index is damaged: it does not agree with its digest", start)
        offsets = count * ADDRESS_BYTES
        lengths = offsets + count * 8
        self.addresses: Addresses = as_addresses(index[:offsets])
        self._offsets = np.frombuffer(index[offsets:lengths], "<u8")
        self.lengths = np.frombuffer(index[lengths:], "<u4")
        """Bytes of each frame, in the order of the addresses."""

    def find(self, address: bytes) -> tuple[int, int] | None:
        """Return offset and length of a chunk's frame; None: the pack does not have it."""
        wanted = as_addresses(address)
        at = int(np.searchsorted(self.addresses, wanted)[0])
        if at == len(self.addresses) or self.addresses[at] != wanted[0]:
            return None
        return int(self._offsets[at]), int(self.lengths[at])

    def frame(self, offset: int, length: int) -> bytes:
        """Read a frame, without the digest behind it.

        :raises ImageError: it is damaged.
        """
        if not DIGEST_BYTES < length <= LONGEST_FRAME_BYTES:
            raise self.fail(f"a chunk is damaged: it claims {length} bytes", offset)
        framed = self.raw(offset, length)
        frame = framed[:-DIGEST_BYTES]
        if framed[-DIGEST_BYTES:] != digest(frame):
            raise self.fail("a chunk is damaged: it does not agree with its digest", offset)
        return frame

    def raw(self, offset: int, length: int) -> bytes:
        """Read a frame with its digest, as it is.

        :raises ImageError: it cannot be read.
        """
        found = self._file.read(offset, length).tobytes()
        if len(found) != length:
            raise self.fail("a chunk is damaged: it would lie behind the end of the file", offset)
        return found

    def copy(self, chosen: Mask, writer: "PackWriter") -> None:
        """Copy some of the frames into another pack, unchanged."""
        for number in np.flatnonzero(chosen).tolist():
            framed = self.raw(int(self._offsets[number]), int(self.lengths[number]))
            writer.append([(self.addresses[number].ljust(ADDRESS_BYTES, b"\0"), framed)])

    def fail(self, message: str, offset: int | None = None) -> ImageError:
        """Make an error about this pack."""
        return ImageError(self.path, message, offset)

    def close(self) -> None:
        """Close the file; harmless when closed."""
        self._file.close()


class PackWriter:
    """Writes a pack; any thread may append to it.

    :param path: the name of the pack, once it is sealed.
    :raises OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = WholeFile(path)
        self._file = os.fdopen(self._whole.fd, "wb", closefd=False)
        self._lock = threading.Lock()
        # Under the lock: the offset of the next frame, and offset and length of each frame so far.
        self._end = self._file.write(_MAGIC)
        self._frames: dict[bytes, tuple[int, int]] = {}

    def __contains__(self, address: bytes) -> bool:
        return address in self._frames

    def append(self, framed: Sequence[tuple[bytes, bytes]]) -> list[int]:
        """Append chunks that the pack does not have.

        :param framed: address, and frame with its digest, of each.
        :return: the bytes written for each: 0 if the pack had it.
        :raises OSError: the disk is full, or broken.
        """
        written, data = [], []
        with self._lock:
            for address, frame in framed:
                if address in self._frames:
                    written.append(0)
                    continue
                self._frames[address] = self._end, len(frame)
                self._end += len(frame)
                written.append(len(frame))
                data.append(frame)
            self._file.write(b"".join(data))
        return written

    def seal(self) -> None:
        """Write the index, sync the file, and publish it under its name.

        :raises OSError: the disk is full, or broken; no file has got the name.
        """
        addresses = sorted(self._frames)
        places = [self._frames[address] for address in addresses]
        index = b"".join(
            (
                b"".join(addresses),
                np.array([offset for offset, _ in places], "<u8").tobytes(),
                np.array([length for _, length in places], "<u4").tobytes(),
            )
        )
        tail = _TAIL.pack(len(addresses), self._end)
        self._file.write(index + tail + digest(index + tail))
        self._file.close()
        self._whole.publish(replacing=False)
        self._whole.close()

    def give_up(self) -> None:
        """Remove the partial file."""
        try:
            self._file.close()
        except OSError:
            pass  # its buffered bytes do not matter
        self._whole.close()

    @property
    def empty(self) -> bool:
        """Whether it has no chunks."""
        return not self._frames
