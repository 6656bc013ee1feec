"""What is made of a QEMU's stream while that arrives: its digests, and its pages in a mapped-ram file.

To import this takes a third of a second, in which a QEMU can write already.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from blake3 import blake3

from postcopy.channel.whole_file import WholeFile
from postcopy.errors import StreamError
from postcopy.image.base import LARGEST_RAM_BYTES, ImageBlock
from postcopy.image.digests import CHUNK_BYTES, DIGEST_BYTES, ChunkDigests, digest
from postcopy.image.finalize import NO_TIMES, Prepared
from postcopy.image.manifest import Manifest
from postcopy.image.parser import formats_of
from postcopy.memory.runs import Mask
from postcopy.receive.page_file import PageFile
from postcopy.stream.numbers import TARGET_PAGE_BYTES
from postcopy.stream.precopy_decoder import PrecopyDecoder
from postcopy.stream.records import (
    Configuration,
    Description,
    DeviceSection,
    Pages,
    RamSetup,
    Record,
    XbzrlePage,
    ZeroPages,
)

_BUFFER_BYTES: Final = 1 << 20
_SAMPLE_BYTES: Final = 509
"""Of so many bytes one is looked at first: a chunk of a stream that is all zero is rare."""
_TAKERS: Final[dict[type, Callable[[PageFile, Any], None]]] = {
    Pages: PageFile.write,
    ZeroPages: PageFile.clear,
    XbzrlePage: PageFile.change,
}

Fill = Callable[[memoryview], int]
"""Reads some of what comes next into a buffer; returns how many bytes, 0 at the end."""


class _DigestsInOrder:
    """The digests of a file that is read once, from its start to its end."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._present: list[bool] = []
        self._found = bytearray()
        # Of a chunk that has begun.
        self._hasher = blake3()
        self._has_data = False

    def take(self, data: memoryview) -> None:
        """Take the bytes that come next."""
        at = 0
        while at < len(data):
            begun = self.size_bytes % CHUNK_BYTES
            piece = data[at : at + CHUNK_BYTES - begun]
            bytes_of = np.frombuffer(piece, np.uint8)
            self._has_data = bool(
                self._has_data or bytes_of[::_SAMPLE_BYTES].any() or bytes_of.any()
            )
            at += len(piece)
            self.size_bytes += len(piece)
            if len(piece) == CHUNK_BYTES:
                self._end_chunk(digest(piece))
                continue
            self._hasher.update(piece)
            if not self.size_bytes % CHUNK_BYTES:
                self._end_chunk(self._hasher.digest(DIGEST_BYTES))

    def _end_chunk(self, found: bytes) -> None:
        self._present.append(self._has_data)
        if self._has_data:
            self._found += found
        self._hasher, self._has_data = blake3(), False

    def finish(self) -> ChunkDigests:
        """Return all of them."""
        if self.size_bytes % CHUNK_BYTES:
            self._end_chunk(self._hasher.digest(DIGEST_BYTES))
        mask = np.array(self._present, np.bool_)
        return ChunkDigests.of(self.size_bytes, mask, bytes(self._found))


class _Summary:
    """What a manifest tells of a stream, and how many of its pages have data."""

    def __init__(self) -> None:
        self.machine = ""
        self.blocks: tuple[ImageBlock, ...] = ()
        self._with_data: dict[str, Mask] = {}

    def take(self, record: Record) -> None:
        """Take the record that comes next."""
        match record:
            case Configuration():
                self.machine = record.machine
            case RamSetup():
                self.blocks = blocks_of(record)
                # They take memory only where pages have come.
                self._with_data = {
                    each.name: np.zeros(each.pages, np.bool_) for each in self.blocks
                }
            case Pages() | ZeroPages():
                numbers = (record.offsets // np.uint64(TARGET_PAGE_BYTES)).astype(np.int64)
                self._with_data[record.block][numbers] = isinstance(record, Pages)
            case XbzrlePage():
                self._with_data[record.block][record.offset // TARGET_PAGE_BYTES] = True

    @property
    def data_bytes(self) -> int:
        """The size of the pages whose last copy has data."""
        return sum(int(each.sum()) for each in self._with_data.values()) * TARGET_PAGE_BYTES


def blocks_of(setup: RamSetup) -> tuple[ImageBlock, ...]:
    """The blocks of a stream, as those of an image."""
    return tuple(ImageBlock(each.name, each.size_bytes) for each in setup.blocks)


def sum_up(fill: Fill) -> Prepared:
    """Prepare an image that is the stream itself."""
    digests, summary = _DigestsInOrder(), _Summary()
    try:
        for record in _records(fill, digests.take):
            summary.take(record)
    except StreamError:
        # Such as of a device in front of the memory.  What is wrong is found in the whole file.
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while count := fill(buffer):
            digests.take(buffer[:count])
        return Prepared(digests.finish())
    taken = digests.finish()
    manifest = Manifest("stream", summary.machine, summary.blocks, taken, NO_TIMES)
    return Prepared(taken, manifest, None, summary.data_bytes)


def write_anew(fill: Fill, file: WholeFile) -> Prepared:
    """Prepare an image of the form mapped-ram.

    :raises StreamError: that cannot be done on the way.
    """
    configuration: Configuration | None = None
    blocks: tuple[ImageBlock, ...] = ()
    pages: PageFile | None = None
    devices: list[DeviceSection] = []
    text = None
    with contextlib.ExitStack() as opened:
        for record in _records(fill, lambda _: None):
            match record:
                case Configuration():
                    configuration = record
                case RamSetup():
                    assert configuration is not None
                    pages = PageFile(file, configuration, record)
                    opened.callback(pages.close)
                    blocks = blocks_of(record)
                case DeviceSection():
                    devices.append(record)
                case Description():
                    text = record.text
                case Pages() | ZeroPages() | XbzrlePage():
                    assert pages is not None
                    _TAKERS[type(record)](pages, record)
        assert pages is not None
        assert configuration is not None
        written = pages.finish(devices, text)
    manifest = Manifest("mapped-ram", configuration.machine, blocks, written.digests, NO_TIMES)
    return Prepared(written.digests, manifest, file, written.data_bytes)


def _records(fill: Fill, look: Callable[[memoryview], None]) -> Iterator[Record]:
    """Read all of a stream.

    :param look: called with all bytes, in order, before they are decoded.
    """
    decoder = PrecopyDecoder(formats_of, LARGEST_RAM_BYTES)
    ended = False
    while True:
        record = decoder.next_record()
        if record is not None:
            yield record
        elif ended:
            break
        else:
            buffer = decoder.buffer()
            if count := fill(buffer):
                look(buffer[:count])
                decoder.received(count)
            else:
                ended = True
                decoder.end_input()
    decoder.finish()
