"""An image whose memory is in a chunk store: the file has the machine, the manifest the addresses.

The file is a magic of our own and a plain stream without pages: because of the magic no program, such as
a QEMU, loads it as a machine whose memory is all zero.  The manifest lists every chunk of every block: no
other image is needed, and there is no chain to follow.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from postcopy.errors import ImageError
from postcopy.image.base import Image, ImageBlock, PageRows
from postcopy.image.digests import CHUNK_BYTES
from postcopy.image.file import Damage, ImageFile
from postcopy.image.file_kinds import CHUNK_IMAGE_MAGIC
from postcopy.image.manifest import ADDRESS_BYTES, Manifest, StoredBlock
from postcopy.image.parser import read_elements, read_plain_blocks, read_start
from postcopy.image.store.store import ChunkStore
from postcopy.memory.runs import Mask
from postcopy.stream.numbers import FLAGS_MASK, TARGET_PAGE_BYTES, RamFlag, refuse_flags
from postcopy.stream.reader import FileBuffer

MAGIC: Final = CHUNK_IMAGE_MAGIC
PAGES_PER_CHUNK: Final = CHUNK_BYTES // TARGET_PAGE_BYTES

_KEPT_CHUNKS: Final = 64  # 4 MiB: a reader that goes page by page unpacks each chunk once


class NoPages:
    """Reads the memory's sections: see :class:`postcopy.image.parser.RamReader`."""

    def read_blocks(
        self, reader: FileBuffer, total_bytes: int, page_sizes: int
    ) -> list[ImageBlock]:
        """See :meth:`postcopy.image.parser.RamReader.read_blocks`."""
        return read_plain_blocks(reader, total_bytes, page_sizes)

    def read_body(self, reader: FileBuffer) -> None:
        """See :meth:`postcopy.image.parser.RamReader.read_body`."""
        if (word := reader.u64()) != RamFlag.EOS:
            refuse_flags(reader, word & FLAGS_MASK)


class _Chunks:
    """The chunks of one block."""

    def __init__(self, block: ImageBlock, stored: StoredBlock) -> None:
        self.block = block
        self.present = stored.present
        self._addresses = stored.addresses
        self._slots = np.cumsum(stored.present, dtype=np.int64) - 1

    def address(self, chunk: int) -> bytes:
        """The address of a chunk that is present."""
        at = int(self._slots[chunk]) * ADDRESS_BYTES
        return self._addresses[at : at + ADDRESS_BYTES]

    def length(self, chunk: int) -> int:
        """The bytes of a chunk: the last one of a block may be shorter."""
        return min(CHUNK_BYTES, self.block.size_bytes - chunk * CHUNK_BYTES)


class ChunkImage(Image):
    """An image of chunks.

    :raises ImageError: there is no manifest, or it does not belong to this file.
    :raises StreamError: the file is not valid.
    :raises Incomplete: the file is truncated.
    """

    def __init__(self, path: Path, file: ImageFile, reader: FileBuffer) -> None:
        super().__init__(path, "chunks", read_elements(reader, read_start(reader), NoPages()))
        manifest = Manifest.load(path)
        stored = manifest.stored
        if stored is None or manifest.blocks != tuple(self.blocks):
            raise self.fail("the manifest does not belong to this image")
        self._file = file
        self.store = ChunkStore(path.parent / stored.store)
        self._chunks = {
            block.name: _Chunks(block, stored.blocks[block.name]) for block in self.blocks
        }
        self._lock = threading.Lock()
        self._unpacked: OrderedDict[bytes, bytes] = OrderedDict()  # those used last, under the lock

    def has_data(self, block_name: str) -> Mask:
        """See :meth:`Image.has_data`; pages come in chunks, so a page with data may be all zero."""
        chunks = self._chunks[block_name]
        return np.repeat(chunks.present, PAGES_PER_CHUNK)[: chunks.block.pages]

    def locate(self, start: int, end: int) -> tuple[str, int] | None:  # noqa: ARG002 - see Image
        """See :meth:`Image.locate`: no memory is in the file."""
        return None

    def damages(self) -> Iterator[Damage]:
        """See :meth:`Image.damages`."""
        every = [
            (chunks, chunk)
            for chunks in self._chunks.values()
            for chunk in np.flatnonzero(chunks.present).tolist()
        ]
        with ThreadPoolExecutor(2, "chunks") as pool:
            for found in pool.map(lambda each: self._damage(*each), every):
                if found is not None:
                    yield found

    def _damage(self, chunks: _Chunks, chunk: int) -> Damage | None:
        address, length = chunks.address(chunk), chunks.length(chunk)
        try:
            self.store.get(address, length)
        except ImageError as error:
            where = chunks.block.name, chunk * CHUNK_BYTES
            return Damage(Path(error.path), error.offset or 0, length, *where)
        return None

    def _copy(self, block: ImageBlock, first: int, rows: PageRows) -> None:
        chunks = self._chunks[block.name]
        start = first * TARGET_PAGE_BYTES
        flat = rows.reshape(-1)
        begin, end = start // CHUNK_BYTES, -(-(start + flat.size) // CHUNK_BYTES)
        for chunk in (begin + np.flatnonzero(chunks.present[begin:end])).tolist():
            data = np.frombuffer(self._unpack(chunks, chunk), np.uint8)
            at = chunk * CHUNK_BYTES - start
            skipped = max(-at, 0)
            wanted = data[skipped : flat.size - at]
            flat[at + skipped : at + skipped + len(wanted)] = wanted

    def _unpack(self, chunks: _Chunks, chunk: int) -> bytes:
        address = chunks.address(chunk)
        with self._lock:
            if (data := self._unpacked.get(address)) is not None:
                self._unpacked.move_to_end(address)
                return data
        try:
            data = self.store.get(address, chunks.length(chunk))
        except ImageError as error:
            where = f"block {chunks.block.name} from offset {chunk * CHUNK_BYTES:#x} on"
            raise ImageError(error.path, f"{error.message}: {where} of {self.path}") from error
        with self._lock:
            self._unpacked[address] = data
            if len(self._unpacked) > _KEPT_CHUNKS:
                self._unpacked.popitem(last=False)
        return data

    def close(self) -> None:
        """See :meth:`Image.close`."""
        self._file.close()
        self.store.close()
