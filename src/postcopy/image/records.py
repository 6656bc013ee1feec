"""An image record by record, in the order of its file: for ``postcopy inspect --records``."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from postcopy.errors import ImageError, StreamError
from postcopy.image.base import ImageBlock
from postcopy.image.chunked import NoPages
from postcopy.image.device_fields import FieldDecoder
from postcopy.image.file import ImageFile
from postcopy.image.formats import check_not_packed, locate_stream, naming
from postcopy.image.mapped_ram import MappedRam
from postcopy.image.parser import RamReader, find_description, read_elements, read_start
from postcopy.image.stream import StreamRam, kinds_of, offset_of
from postcopy.memory.runs import Indices
from postcopy.stream.file_records import Configuration, DeviceSection, MappedBlock
from postcopy.stream.mapped_ram import CAPABILITY, decode_bitmap
from postcopy.stream.numbers import TARGET_PAGE_BYTES, Command, SectionType
from postcopy.stream.reader import FileBuffer

_COMMAND_BYTES: Final = 5
_ID_BYTES: Final = 4
_KINDS: Final = ("zeros", "pages", "xbzrle")


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One record of an image's file.

    :ivar offset: of its first byte in the file; of ``pages``, ``zeros`` and ``xbzrle``, of the
        first page's contents.
    :ivar kind: ``libvirt``, ``configuration``, ``start``, ``block``, ``part``, ``end``, ``pages``,
        ``zeros``, ``xbzrle``, ``command``, ``section``, ``eof`` or ``description``.
    :ivar values: what it says; JSON can carry them.
    """

    offset: int
    kind: str
    values: dict[str, Any] = field(default_factory=dict)


Sink = Callable[[ImageRecord], None]


def read_records(path: Path, sink: Sink) -> None:
    """Read an image, and call ``sink`` for each record, in the order of the file.

    Neighbouring pages of one kind are one record, so a record of a solid block of memory has many pages.

    :raises ImageError: the file is no image; the records in front of the fault have been told.
    """
    with ImageFile(path) as file:
        reader = FileBuffer(file.read, file.size_bytes)
        with naming(path, reader):
            stream = locate_stream(file)
            if stream.libvirt is not None:
                sink(ImageRecord(0, "libvirt", stream.libvirt.to_json()))
            check_not_packed(path, stream)
            reader.seek(stream.offset)
            configuration = read_start(reader)
            sink(ImageRecord(stream.offset, "configuration", _configuration(configuration)))
            text, end = find_description(reader)
            ram: RamReader
            if stream.chunked:
                ram = _ChunkRecords(sink)
            elif CAPABILITY in configuration.capabilities:
                ram = _MappedRecords(file, sink)
            else:
                ram = _StreamRecords(sink)
            elements = _Elements(path, file, sink, text)
            read_elements(reader, configuration, ram, elements.note)
            if text is not None:
                sink(ImageRecord(end, "description", {"length_bytes": len(text.encode())}))


def _configuration(found: Configuration) -> dict[str, Any]:
    return {
        "machine": found.machine,
        "page_bits": found.page_bits,
        "capabilities": list(found.capabilities),
        "uuid": None if found.uuid is None else found.uuid.hex(),
    }


class _Elements:
    """Tells of everything but memory."""

    def __init__(self, path: Path, file: ImageFile, sink: Sink, description: str | None) -> None:
        self._path = path
        self._file = file
        self._sink = sink
        self._decoder = FieldDecoder(description)

    def note(self, offset: int, element: SectionType, section: DeviceSection | None) -> None:
        """See :func:`postcopy.image.parser.read_elements`."""
        if section is not None:
            self._sink(ImageRecord(offset, "section", self._section(offset, section)))
        elif element is SectionType.COMMAND:
            self._sink(ImageRecord(offset, "command", self._command(offset)))
        elif element is SectionType.EOF:
            self._sink(ImageRecord(offset, "eof"))
        else:
            section_id = int.from_bytes(self._file.read(offset + 1, _ID_BYTES), "big")
            self._sink(ImageRecord(offset, element.name.lower(), {"section_id": section_id}))

    def _section(self, offset: int, section: DeviceSection) -> dict[str, Any]:
        values = {
            "section_id": section.section_id,
            "name": section.name,
            "instance": section.instance,
            "version": section.version,
            "length_bytes": len(section.payload),
        }
        try:
            return values | {"fields": self._decoder.decode(section)}
        except StreamError as error:
            where = f"device {section.name} {section.instance}"
            raise ImageError(self._path, f"{where}: {error.message}", offset) from error

    def _command(self, offset: int) -> dict[str, Any]:
        number = int.from_bytes(self._file.read(offset + 1, 2), "big")
        length = int.from_bytes(self._file.read(offset + 3, 2), "big")
        payload = self._file.read(offset + _COMMAND_BYTES, length).tobytes()
        known = number in set(Command)
        name = Command(number).name if known else str(number)
        return {"name": name, "payload": payload.hex()}


def _block(block: ImageBlock | MappedBlock) -> dict[str, Any]:
    return {"block": block.name, "size_bytes": block.size_bytes}


def _note_blocks(sink: Sink, at: int, blocks: Iterable[ImageBlock]) -> None:
    """Tell of a list of blocks that begins at ``at``."""
    for block in blocks:
        sink(ImageRecord(at, "block", _block(block) | {"page_size_bytes": block.page_size_bytes}))
        huge = block.page_size_bytes != TARGET_PAGE_BYTES
        at += 1 + len(block.name.encode()) + (16 if huge else 8)


class _ChunkRecords(NoPages):
    """Tells of the blocks of an image of chunks."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def read_blocks(
        self, reader: FileBuffer, total_bytes: int, page_sizes: int
    ) -> list[ImageBlock]:
        at = reader.position
        blocks = super().read_blocks(reader, total_bytes, page_sizes)
        _note_blocks(self._sink, at, blocks)
        return blocks


class _MappedRecords(MappedRam):
    """Tells of the blocks of a mapped-ram file."""

    def __init__(self, file: ImageFile, sink: Sink) -> None:
        super().__init__(file)
        self._sink = sink

    def read_blocks(
        self, reader: FileBuffer, total_bytes: int, page_sizes: int
    ) -> list[ImageBlock]:
        blocks = super().read_blocks(reader, total_bytes, page_sizes)
        for block in self.blocks.values():
            bits = self._file.read(block.bitmap_offset, block.bitmap_bytes)
            values = _block(block) | {
                "bitmap_offset": block.bitmap_offset,
                "pages_offset": block.pages_offset,
                "pages": int(decode_bitmap(block, bits.data).sum()),
            }
            at = block.header_offset - len(block.name.encode()) - 9
            self._sink(ImageRecord(at, "block", values))
        return blocks


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring pages of one kind; ``end`` is the page behind them."""

    block: str
    kind: int
    offset: int
    first: int
    end: int


class _StreamRecords(StreamRam):
    """Tells of the pages of a stream, run by run."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink
        self._run: _Run | None = None

    def read_blocks(
        self, reader: FileBuffer, total_bytes: int, page_sizes: int
    ) -> list[ImageBlock]:
        at = reader.position
        blocks = super().read_blocks(reader, total_bytes, page_sizes)
        _note_blocks(self._sink, at, blocks)
        return blocks

    def read_body(self, reader: FileBuffer) -> None:
        super().read_body(reader)
        self._flush()

    def add(self, block: str, pages: Indices, places: Indices) -> None:
        """See :meth:`StreamRam.add`; nothing is kept but the run that may go on."""
        kinds = kinds_of(places)
        ends = (np.diff(pages) != 1) | (np.diff(kinds) != 0)
        starts = [0, *(np.flatnonzero(ends) + 1).tolist(), len(pages)]
        for start, end in itertools.pairwise(starts):
            kind, first = int(kinds[start]), int(pages[start])
            run = self._run
            if run is not None and (run.block, run.kind, run.end) == (block, kind, first):
                self._run = replace(run, end=first + end - start)
            else:
                self._flush()
                at = offset_of(int(places[start]))
                self._run = _Run(block, kind, at, first, first + end - start)

    def _flush(self) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        values = {
            "block": run.block,
            "block_offset": run.first * TARGET_PAGE_BYTES,
            "pages": run.end - run.first,
        }
        self._sink(ImageRecord(run.offset, _KINDS[run.kind], values))
