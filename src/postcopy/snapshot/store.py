"""Chunks of guest memory in a folder, each under the digest of what it holds, and each only once.

A chunk is 64 KiB of memory, compressed by zstd, in a file ``ab/cdef....zst`` named by its address: the
BLAKE3 digest, all 256 bits, of what it holds.  Behind the frame stands a digest of the frame, since some
bits of it mean nothing to a decompressor, and no bit may flip unnoticed.

Any number of images share a folder: that is how a chain of snapshots costs only what has changed.  No
image needs another one to be read.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import zstandard
from blake3 import blake3

from postcopy.errors import ImageError
from postcopy.kernel import calls
from postcopy.snapshot.digests import CHUNK_BYTES, DIGEST_BYTES, digest
from postcopy.snapshot.image_file import open_regular
from postcopy.snapshot.publish import MODE

LEVEL: Final = 1
"""Guest memory compresses about as well at 1 as at 3, and twice as fast."""

_LONGEST_BYTES: Final = CHUNK_BYTES + 1024  # what cannot be compressed gets a head and no more


def address_of(data: bytes) -> bytes:
    """The address of a chunk: 32 bytes."""
    return blake3(data).digest()


class ChunkStore:
    """A folder of chunks.  Any thread, and any process, may read and write at the same time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._of_thread = threading.local()

    def place(self, address: bytes) -> Path:
        """The file of a chunk, whether it is there or not."""
        name = address.hex()
        return self.folder / name[:2] / f"{name[2:]}.zst"

    def put(self, data: bytes) -> tuple[bytes, int]:
        """Keep a chunk.

        :param data: at most 64 KiB.
        :return: its address, and how many bytes were written: 0 if it was there already.
        :raises OSError: the disk is full, or broken.
        """
        address = address_of(data)
        place = self.place(address)
        if place.exists():
            return address, 0
        frame = self._compressor.compress(data)
        packed = frame + digest(frame)
        self.folder.mkdir(0o700, parents=True, exist_ok=True)
        place.parent.mkdir(0o700, exist_ok=True)
        written = place.with_name(f".{place.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            fd = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, MODE)
            with os.fdopen(fd, "wb") as file:
                file.write(packed)
            written.replace(place)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
        return address, len(packed)

    def get(self, address: bytes, length_bytes: int) -> bytes:
        """Read a chunk, and see that it is what its address says.

        :raises ImageError: it is not there, or damaged; names its file.
        """
        place = self.place(address)
        frame = _read_frame(place)
        try:
            # The decompressor believes what a frame says of its size: look at that first.
            if zstandard.frame_content_size(frame) != length_bytes:
                raise ImageError(place, "the chunk is damaged: it has another length")
            data = self._decompressor.decompress(frame)
        except zstandard.ZstdError as error:
            raise ImageError(place, f"the chunk is damaged: {error}") from error
        if address_of(data) != address:
            raise ImageError(place, "the chunk is damaged: it does not agree with its address")
        return data

    def sync(self) -> None:
        """Wait until the disk has every chunk: before a manifest that names them is published.

        :raises KernelError: the disk has not taken all of them.
        """
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            calls.syncfs(fd)
        finally:
            os.close(fd)

    def sweep(self, used: Iterable[bytes]) -> int:
        """Remove every chunk that nobody uses any more; return how many there were.

        :param used: the addresses in all manifests that belong to this folder.  No snapshot may be in
            the making.
        """
        kept = {self.place(address) for address in used}
        unused = [place for place in self.folder.glob("??/*.zst") if place not in kept]
        for place in unused:
            place.unlink(missing_ok=True)
        return len(unused)

    @property
    def _compressor(self) -> zstandard.ZstdCompressor:
        # One for each thread: they cannot be shared, and are dear to make.
        made: zstandard.ZstdCompressor | None = getattr(self._of_thread, "compressor", None)
        if made is None:
            made = self._of_thread.compressor = zstandard.ZstdCompressor(LEVEL)
        return made

    @property
    def _decompressor(self) -> zstandard.ZstdDecompressor:
        made: zstandard.ZstdDecompressor | None = getattr(self._of_thread, "decompressor", None)
        if made is None:
            made = self._of_thread.decompressor = zstandard.ZstdDecompressor()
        return made


def _read_frame(place: Path) -> bytes:
    with os.fdopen(open_regular(place), "rb", buffering=0) as file:
        packed = file.read(_LONGEST_BYTES + 1)
    if len(packed) > _LONGEST_BYTES:
        raise ImageError(place, f"the chunk is damaged: it is longer than {_LONGEST_BYTES} bytes")
    frame = packed[:-DIGEST_BYTES]
    if packed[-DIGEST_BYTES:] != digest(frame):
        raise ImageError(place, "the chunk is damaged: it does not agree with its own digest")
    return frame
