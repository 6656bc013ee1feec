"""Streams for tests: a small layout, sections whose format is known, and all records as bytes."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from postcopy.errors import StreamError
from postcopy.stream.commands import encode_command
from postcopy.stream.decoder import Decoder, PreemptDecoder
from postcopy.stream.encoder import (
    RamPart,
    description,
    device_section,
    end_of_stream,
    ram_setup,
    stream_start,
)
from postcopy.stream.layout import BlockLayout
from postcopy.stream.numbers import SectionType
from postcopy.stream.ram_encoder import PageEncoder
from postcopy.stream.records import (
    BlockEntry,
    Configuration,
    Description,
    DeviceSection,
    EndOfStream,
    Pages,
    RamBody,
    RamBodyEnd,
    RamSetup,
    Record,
    ZeroPages,
)

PAGE = 4096
SECTION = 2
LAYOUT = {"ram": BlockLayout(64 * PAGE), "rom": BlockLayout(16 * PAGE)}
SETUP = RamSetup(SECTION, (BlockEntry("ram", 64 * PAGE), BlockEntry("rom", 16 * PAGE)))
START = stream_start(Configuration("none"))
SOURCES = {
    name: np.random.default_rng(len(name)).integers(
        1, 256, (block.size_bytes // PAGE, PAGE), dtype=np.uint8
    )
    for name, block in LAYOUT.items()
}


class CountedFormats:
    """Every known device starts with its length in one byte, so that a length can be missing."""

    def payload_length(self, name, instance, version, data):
        if name != "timer" or instance > 1:
            raise StreamError(f"Unknown savevm section or instance '{name}' {instance}.")
        if version != 2:
            raise StreamError(f"savevm: unsupported version {version} for 'timer' v2", 0)
        return None if not len(data) else 1 + data[0]


def device(payload: bytes, section_id: int = 7) -> DeviceSection:
    return DeviceSection(section_id, "timer", 0, 2, bytes((len(payload),)) + payload)


def offsets(*indices: int) -> np.ndarray:
    return np.array(indices, np.uint64) * np.uint64(PAGE)


class Writer:
    """Writes any records as one stream."""

    def __init__(self) -> None:
        self.pages = PageEncoder()
        self.section_id = SECTION
        self._writers = {
            Configuration: stream_start,
            RamSetup: self._setup,
            RamBody: lambda record: RamPart(self.section_id, record.kind).head,
            RamBodyEnd: lambda record: RamPart(self.section_id, record.kind).tail,
            Pages: self._pages,
            ZeroPages: lambda record: self.pages.zeros(record.block, record.offsets),
            DeviceSection: device_section,
            EndOfStream: lambda _: end_of_stream(),
            Description: lambda record: description(record.text),
        }

    def write(self, records: Iterable[Record]) -> bytes:
        return b"".join(map(self.one, records))

    def one(self, record: Record) -> bytes:
        write = self._writers.get(type(record), encode_command)
        return write(record)

    def _setup(self, record: RamSetup) -> bytes:
        self.section_id = record.section_id
        return ram_setup(record, postcopy=False)

    def _pages(self, record: Pages) -> bytes:
        return bytes(self.pages.pages(record.block, record.offsets, SOURCES[record.block]))


def flat(records: Iterable[Record]) -> Iterator[object]:
    """Name pages one by one, so that it does not matter how they were batched."""
    for record in records:
        if isinstance(record, Pages):
            for offset, row in zip(record.offsets, record.data, strict=True):
                yield "page", record.block, int(offset), row.tobytes()
        elif isinstance(record, ZeroPages):
            yield from (("zero", record.block, int(offset)) for offset in record.offsets)
        else:
            yield record


def drain(decoder: Decoder | PreemptDecoder) -> list[object]:
    found: list[object] = []
    while (record := decoder.next_record()) is not None:
        found += flat([record])
    return found


def decode(
    data: bytes, decoder: Decoder | PreemptDecoder, cuts: Sequence[int] = ()
) -> list[object]:
    """Feed ``data`` in pieces that end at ``cuts``, and take what comes after each."""
    found: list[object] = []
    edges = [0, *sorted(cuts), len(data)]
    for begin, end in itertools.pairwise(edges):
        decoder.feed(data[begin:end])
        found += drain(decoder)
    return found


def new_decoder(**options) -> Decoder:
    return Decoder(CountedFormats(), LAYOUT, **options)


def part(*records: bytes, kind: SectionType = SectionType.PART) -> bytes:
    return RamPart(SECTION, kind).around(*records)
