"""Chunks of guest memory in a folder, each stored once and addressed by its digest.

A chunk is 64 KiB of memory, and its address is the BLAKE3 digest (256 bits) of that memory.  Chunks lie in
packs (:mod:`postcopy.image.store.pack_file`), one for each snapshot that had new chunks: with one file a
chunk most of the time would go to the file system.

Any number of images share a folder, so a chain of snapshots takes only the space of what has changed.
To read an image no other image is needed.
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
    """A folder of chunks.  Any threads and processes may read and write at the same time.

    Packs stay open until :meth:`close`: use the store in a ``with``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        # Under the lock, by name: packs that can be read, and the errors of the others.
        self._packs: dict[str, PackFile] = {}
        self._damaged: dict[str, ImageError] = {}

    @property
    def exists(self) -> bool:
        """Whether the folder is a store."""
        return (self.folder / _LOCK).exists() or any(self.folder.glob(f"*{SUFFIX}"))

    @contextlib.contextmanager
    def held(self, *, exclusive: bool = False) -> Iterator[None]:
        """Lock the store against pruning, from the first new chunk to the manifest that names it.

        :param exclusive: lock it for pruning.
        :raises Refused: ``exclusive``, and a snapshot writes into the store.
        :raises OSError: the folder cannot be made.
        """
        self.folder.mkdir(0o700, parents=True, exist_ok=True)
        fd = os.open(self.folder / _LOCK, _OPEN_LOCK, MODE)
        try:
            self._flock(fd, exclusive=exclusive)
            yield
        finally:
            os.close(fd)

    def _flock(self, fd: int, *, exclusive: bool) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except BlockingIOError as error:
            raise Refused(
                f"a snapshot writes into {self.folder}; prune it when the snapshot has ended"
            ) from error

    @contextlib.contextmanager
    def intake(self) -> Iterator["Intake"]:
        """Add chunks; at the end of the ``with`` either all of them are on the disk, or none.

        :raises OSError: the disk is full, or broken.
        """
        with self.new_pack() as writer:
            yield Intake(self, writer)

    @contextlib.contextmanager
    def new_pack(self) -> Iterator[PackWriter]:
        """Write a pack of chunks that are compressed already; see :meth:`intake`."""
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
        """Return the pack that has a chunk, and offset and length of its frame; None: no pack has it."""
        found = self.look(address)
        if found is None:
            self.open_new_packs()
            found = self.look(address)
        return found

    def get(self, address: bytes, length_bytes: int) -> bytes:
        """Read a chunk, and check it against its address.

        :raises ImageError: it is missing or damaged; the error names its file.
        """
        found = self.find(address)
        if found is None:
            for error in self.damaged:
                raise error  # the chunk may be in that pack
            raise ImageError(self.folder, f"the chunk {address.hex()} is not there any more")
        pack, offset, length = found
        frame = pack.frame(offset, length)
        try:
            # The decompressor trusts the size in the frame, so that is checked first.
            if zstandard.frame_content_size(frame) != length_bytes:
                raise pack.fail("a chunk is damaged: it has another length", offset)
            data = self._decompressor.decompress(frame)
        except zstandard.ZstdError as error:
            raise pack.fail(f"a chunk is damaged: {error}", offset) from error
        if address_of(data) != address:
            raise pack.fail("a chunk is damaged: it does not agree with its address", offset)
        return data

    def frame_of(self, data: bytes) -> bytes:
        """Encode a chunk for a pack: compressed, with a digest behind."""
        frame = self._compressor.compress(data)
        return frame + digest(frame)

    def close(self) -> None:
        """Close the packs."""
        with self._lock:
            while self._packs:
                self._packs.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def packs(self) -> tuple[PackFile, ...]:
        """The packs that are open."""
        return tuple(self._packs.values())

    @property
    def damaged(self) -> tuple[ImageError, ...]:
        """The errors of packs that cannot be read."""
        return tuple(self._damaged.values())

    def look(self, address: bytes) -> tuple[PackFile, int, int] | None:
        """As :meth:`find`, in the packs that are open."""
        for pack in self.packs:
            if (place := pack.find(address)) is not None:
                return pack, *place
        return None

    def open_new_packs(self) -> None:
        """Open the packs that have been added since."""
        with self._lock:
            for path in sorted(self.folder.glob(f"*{SUFFIX}")):
                if path.name in self._packs:
                    continue
                try:
                    self._packs[path.name] = PackFile(path)
                except ImageError as error:
                    # Or pruned meanwhile: then the chunks that are used are in another pack.
                    if path.exists():
                        self._damaged[path.name] = error

    @property
    def _compressor(self) -> zstandard.ZstdCompressor:
        # One for each thread: they cannot be shared, and take long to make.
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
    """Adds chunks to a store; any thread may call."""

    def __init__(self, store: ChunkStore, writer: PackWriter) -> None:
        store.open_new_packs()
        self._store = store
        self._writer = writer

    def put(self, chunks: Sequence[bytes]) -> list[tuple[bytes, int]]:
        """Add chunks.

        :param chunks: at most 64 KiB each.
        :return: for each the address, and the bytes written: 0 if the store had it already.
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
