"""Chunks of guest memory in a folder, each under the digest of what it holds, and each only once.

A chunk is 64 KiB of memory, and its address the BLAKE3 digest, all 256 bits, of what it holds.  They lie in
packs (:mod:`postcopy.image.store.pack_file`), one for each snapshot that brought anything new: a file for
each chunk takes most of its time in the file system.

Any number of images share a folder: that is how a chain of snapshots costs only what has changed.  No
image needs another one to be read.
"""

import contextlib
import fcntl
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Self

import zstandard
from blake3 import blake3

from postcopy.channel.whole_file import MODE
from postcopy.errors import ImageError, Refused
from postcopy.image.digests import digest
from postcopy.image.store.pack_file import SUFFIX, PackFile, PackWriter

LEVEL: Final = 1
"""Guest memory compresses about as well at 1 as at 3, and twice as fast."""

_LOCK: Final = "lock"
_OPEN_LOCK: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def address_of(data: bytes) -> bytes:
    """The address of a chunk: 32 bytes."""
    return blake3(data).digest()


class ChunkStore:
    """A folder of chunks.  Any thread, and any process, may read and write at the same time.

    Each pack that has been looked into stays open until it is closed: use it in a ``with``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        # Under the lock, by name: those that can be read, and what is wrong with the others.
        self._packs: dict[str, PackFile] = {}
        self._damaged: dict[str, ImageError] = {}

    @property
    def exists(self) -> bool:
        """Whether the folder is a store."""
        return (self.folder / _LOCK).exists() or any(self.folder.glob(f"*{SUFFIX}"))

    @contextlib.contextmanager
    def held(self, *, alone: bool = False) -> Iterator[None]:
        """Keep the store from being swept: from the first chunk to the manifest that names it.

        :param alone: sweep it.
        :raises Refused: ``alone``, and somebody is putting chunks into it.
        :raises OSError: the folder cannot be made.
        """
        self.folder.mkdir(0o700, parents=True, exist_ok=True)
        fd = os.open(self.folder / _LOCK, _OPEN_LOCK, MODE)
        try:
            self._flock(fd, alone=alone)
            yield
        finally:
            os.close(fd)

    def _flock(self, fd: int, *, alone: bool) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError as error:
            raise Refused(
                f"a snapshot is being put into {self.folder}; sweep it when that is done"
            ) from error

    @contextlib.contextmanager
    def intake(self) -> Iterator["Intake"]:
        """Take chunks; they are there, on the disk, at the end of the ``with``, or none of them.

        :raises OSError: the disk is full, or broken.
        """
        with self.new_pack() as writer:
            yield Intake(self, writer)

    @contextlib.contextmanager
    def new_pack(self) -> Iterator[PackWriter]:
        """A pack for chunks that are compressed already; see :meth:`intake`."""
        self.folder.mkdir(0o700, parents=True, exist_ok=True)
        writer = PackWriter(self.folder / f"{secrets.token_hex(8)}{SUFFIX}")
        try:
            yield writer
            if writer.empty:
                writer.give_up()
            else:
                writer.seal()
        except BaseException:
            writer.give_up()
            raise

    def find(self, address: bytes) -> tuple[PackFile, int, int] | None:
        """The pack that has a chunk, and offset and length of its frame there; None: it is nowhere."""
        found = self.look(address)
        if found is None:
            self.learn()
            found = self.look(address)
        return found

    def get(self, address: bytes, length_bytes: int) -> bytes:
        """Read a chunk, and see that it is what its address says.

        :raises ImageError: it is not there, or damaged; names its file.
        """
        found = self.find(address)
        if found is None:
            for error in self.damaged:
                raise error  # it may have been there
            raise ImageError(self.folder, f"the chunk {address.hex()} is not there any more")
        pack, offset, length = found
        frame = pack.frame(offset, length)
        try:
            # The decompressor believes what a frame says of its size: look at that first.
            if zstandard.frame_content_size(frame) != length_bytes:
                raise pack.fail("a chunk is damaged: it has another length", offset)
            data = self._decompressor.decompress(frame)
        except zstandard.ZstdError as error:
            raise pack.fail(f"a chunk is damaged: {error}", offset) from error
        if address_of(data) != address:
            raise pack.fail("a chunk is damaged: it does not agree with its address", offset)
        return data

    def frame_of(self, data: bytes) -> bytes:
        """A chunk as it stands in a pack: compressed, with a digest behind."""
        frame = self._compressor.compress(data)
        return frame + digest(frame)

    def close(self) -> None:
        """Let go of the packs."""
        with self._lock:
            while self._packs:
                self._packs.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def packs(self) -> tuple[PackFile, ...]:
        """Those that are known by now and can be read."""
        return tuple(self._packs.values())

    @property
    def damaged(self) -> tuple[ImageError, ...]:
        """What is wrong with packs that cannot be read."""
        return tuple(self._damaged.values())

    def look(self, address: bytes) -> tuple[PackFile, int, int] | None:
        """As :meth:`find`, in the packs that are known by now."""
        for pack in self.packs:
            if (place := pack.find(address)) is not None:
                return pack, *place
        return None

    def learn(self) -> None:
        """Open the packs that have come since."""
        with self._lock:
            for path in sorted(self.folder.glob(f"*{SUFFIX}")):
                if path.name in self._packs:
                    continue
                try:
                    self._packs[path.name] = PackFile(path)
                except ImageError as error:
                    # Or swept meanwhile: then what is used of it is in another by now.
                    if path.exists():
                        self._damaged[path.name] = error

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


class Intake:
    """Takes chunks into a store; any thread may call."""

    def __init__(self, store: ChunkStore, writer: PackWriter) -> None:
        store.learn()
        self._store = store
        self._writer = writer

    def put(self, chunks: Sequence[bytes]) -> list[tuple[bytes, int]]:
        """Take chunks.

        :param chunks: at most 64 KiB each.
        :return: of each, the address, and how many bytes were written: 0 if it was there already.
        :raises OSError: the disk is full, or broken.
        """
        addresses = [address_of(data) for data in chunks]
        new = [
            (address, self._store.frame_of(data))
            for address, data in zip(addresses, chunks, strict=True)
            if address not in self._writer and self._store.look(address) is None
        ]
        written: dict[bytes, int] = {}
        for (address, _), count in zip(new, self._writer.append(new), strict=True):
            written.setdefault(address, count)
        return [(address, written.pop(address, 0)) for address in addresses]
