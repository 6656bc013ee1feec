"""The stream around the pages of a mapped-ram file: in any pieces, cut, and with every byte turned."""

import contextlib
import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.streams import LAYOUT, PAGE, SECTION, CountedFormats, device, new_decoder
from postcopy.errors import Refused, StreamError
from postcopy.stream.block_list import encode_list_end, encode_list_start
from postcopy.stream.encoder import (
    RamPart,
    description,
    device_section,
    end_of_stream,
    stream_start,
)
from postcopy.stream.layout import Expected
from postcopy.stream.mapped_decoder import MappedDecoder
from postcopy.stream.mapped_ram import encode_entry, lay_out
from postcopy.stream.numbers import SectionType
from postcopy.stream.records import (
    BlockEntry,
    Configuration,
    Description,
    EndOfStream,
    MappedBlock,
    RamBody,
    RamBodyEnd,
    RamSetup,
)

CONFIGURATION = Configuration("none", capabilities=("mapped-ram",))
BLOCKS = [("ram", 64 * PAGE), ("rom", 16 * PAGE)]
PART, END = SectionType.PART, SectionType.END


def write(start=0, blocks=BLOCKS, layout=None, tail=None):
    """A file of which all but the stream is zero."""
    file = io.BytesIO()
    file.seek(start)
    file.write(stream_start(CONFIGURATION))
    file.write(encode_list_start(SECTION, sum(size for _, size in blocks)))
    laid_out, _ = lay_out(blocks, file.tell())
    for block in laid_out:
        file.write(encode_entry(block))
        file.seek(block.end_offset)
    file.write(encode_list_end(SECTION))
    file.write(RamPart(SECTION).around() * 2)
    file.write(RamPart(SECTION, END).around() if tail is None else tail)
    file.write(device_section(device(b"abc")) + end_of_stream() + description("{}"))
    return file.getvalue(), laid_out


def decode(data, start=0, *, step=1 << 16):
    """As a destination does it: what comes behind a block is read from its end on."""
    decoder = MappedDecoder(
        CountedFormats(),
        LAYOUT,
        expect=Expected("none", capabilities=frozenset({"mapped-ram"})),
        start_offset=start,
        file_bytes=len(data),
    )
    found, at = [], start
    while True:
        while (record := decoder.next_record()) is not None:
            found.append(record)
            if isinstance(record, MappedBlock):
                at = record.end_offset
                assert decoder.position == at
        if not (piece := data[at : at + step]):
            decoder.finish()
            return found
        decoder.feed(piece)
        at += len(piece)


@given(st.integers(1, 4000), st.integers(0, 5000))
def test_all_of_it_in_any_pieces(step, start):
    data, laid_out = write(start)
    entries = tuple(BlockEntry(name, size) for name, size in BLOCKS)
    parts = [RamBody(PART), RamBodyEnd(PART)] * 2
    assert decode(data, start, step=step) == [
        CONFIGURATION,
        *laid_out,
        RamSetup(SECTION, entries),
        *parts,
        RamBody(END),
        RamBodyEnd(END),
        device(b"abc"),
        EndOfStream(),
        Description("{}"),
    ]


def test_cut_anywhere():
    data, laid_out = write()
    ends = [0, *(block.end_offset for block in laid_out), len(data)]
    lengths = {n for end in ends for n in range(max(0, end - 120), min(end + 40, len(data)))}
    lengths.remove(len(data) - len(description("{}")))  # a stream may do without
    for length in lengths:
        with pytest.raises(StreamError):
            decode(data[:length])


def test_a_page_on_the_stream():
    page = struct.pack(">Q", 8) + b"\3ram" + bytes(PAGE)
    data, laid_out = write(tail=RamPart(SECTION).around(page))
    with pytest.raises(StreamError, match=r"ram: a record \(flags 0x8\) where all pages have") as e:
        decode(data)
    assert e.value.offset == laid_out[-1].end_offset + 13 + 2 * 18 + 5


def test_blocks_that_are_not_ours():
    data, _ = write(blocks=[("ram", 64 * PAGE)])
    with pytest.raises(StreamError, match='"rom" of this side is not in the list'):
        decode(data)
    data, _ = write(blocks=[("ram", 32 * PAGE), ("rom", 16 * PAGE)])
    with pytest.raises(StreamError, match="Size mismatch: ram: 0x20000 != 0x40000"):
        decode(data)
    data, _ = write(blocks=[*BLOCKS, ("vga.vram", PAGE)])
    with pytest.raises(StreamError, match=r'Unknown ramblock "vga\.vram"'):
        decode(data)


def test_pages_that_the_file_does_not_have():
    data, laid_out = write()
    with pytest.raises(StreamError, match="ram: its pages at 0x100000 would end at 0x140000") as e:
        decode(data[: laid_out[0].end_offset - 1])
    assert e.value.offset == laid_out[0].header_offset


def test_a_plain_stream():
    data = stream_start(Configuration("none")) + b"\0"
    with pytest.raises(
        StreamError, match="Capability mapped-ram is on, but received capability is off"
    ):
        decode(data)


def test_the_plain_decoder_does_not_take_such_files():
    with pytest.raises(Refused, match="mapped-ram"):
        new_decoder(expect=Expected(capabilities=frozenset({"mapped-ram"})))
    decoder = new_decoder()
    decoder.feed(write()[0][:4096])
    with pytest.raises(
        StreamError, match="Capability mapped-ram is off, but received capability is on"
    ):
        list(iter(decoder.next_record, None))


@given(st.data())
def test_turned_bits_in_the_head(data):
    """Whatever they make of it: an error of the stream's, or records."""
    raw, laid_out = write()
    raw = bytearray(raw)
    where = st.one_of(
        *(st.integers(end, end + 60) for end in (0, *(b.end_offset for b in laid_out)))
    )
    for at in data.draw(st.lists(where, min_size=1, max_size=4)):
        raw[min(at, len(raw) - 1)] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(StreamError):
        decode(bytes(raw))
