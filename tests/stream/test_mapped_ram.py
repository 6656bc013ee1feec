"""The mapped-ram layout: what is written is read, and what cannot be is refused by name and place."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import StreamCut, StreamError
from postcopy.stream.mapped_ram import (
    MappedBlock,
    bitmap_bytes,
    decode_bitmap,
    encode_bitmap,
    encode_entry,
    lay_out,
    read_list,
)

PAGE = 4096
MIB = 1 << 20

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
lists = st.lists(
    st.tuples(names, st.integers(1, 1 << 22).map(lambda pages: pages * PAGE)),
    min_size=1,
    max_size=8,
    unique_by=lambda block: block[0],
)


class SparseFile:
    """A file of which only what was written is kept."""

    def __init__(self, size):
        self.size = size
        self.pieces = {}

    def write(self, offset, data):
        self.pieces[offset] = data

    def read(self, offset, length):
        found = bytearray(max(0, min(length, self.size - offset)))
        for start, data in self.pieces.items():
            begin, end = max(start, offset), min(start + len(data), offset + len(found))
            if begin < end:
                found[begin - offset : end - offset] = data[begin - start : end - start]
        return bytes(found)


def file_of(blocks, list_offset):
    laid_out, end = lay_out(blocks, list_offset)
    file = SparseFile(end + 8)
    offset = list_offset
    for block in laid_out:
        file.write(offset, encode_entry(block))
        offset = block.end_offset
    return file, laid_out, end


@given(lists, st.integers(0, 1 << 40))
def test_what_is_written_is_read(blocks, list_offset):
    file, laid_out, end = file_of(blocks, list_offset)
    total = sum(size for _, size in blocks)
    assert read_list(file.read, list_offset, total, file.size) == (laid_out, end)


@given(lists, st.integers(0, 1 << 40))
def test_nothing_overlaps(blocks, list_offset):
    laid_out, end = lay_out(blocks, list_offset)
    offset = list_offset
    for block in laid_out:
        assert block.header_offset == offset + 1 + len(block.name.encode()) + 8
        assert block.bitmap_offset == block.header_offset + 28
        assert block.pages_offset % MIB == 0
        assert 0 <= block.pages_offset - block.bitmap_offset - block.bitmap_bytes < MIB
        offset = block.pages_offset + block.size_bytes
    assert offset == end


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_bitmaps(present):
    block = a_block(len(present))
    raw = encode_bitmap(np.array(present))
    assert len(raw) == block.bitmap_bytes == -(-len(present) // 64) * 8
    assert decode_bitmap(block, raw).tolist() == present


def a_block(pages, name="ram"):
    return lay_out([(name, pages * PAGE)], 0x68)[0][0]


def test_where_qemu_puts_it():
    """As seen in a file of QEMU's pc machine with 2 GiB."""
    roms = [("/rom@etc/acpi/tables", 0x20000)]
    ram, rom = lay_out([("pc.ram", 2 << 30), *roms], 0x6B)[0]
    assert (ram.header_offset, ram.bitmap_offset, ram.pages_offset) == (0x7A, 0x96, MIB)
    assert rom.header_offset == 0x80100000 + 0x1D
    assert rom.bitmap_offset == 0x80100000 + 0x39
    assert rom.pages_offset == 0x80200000


def test_words_are_little_endian():
    assert encode_bitmap(np.arange(70) % 70 == 65) == bytes(8) + b"\2" + bytes(7)
    assert bitmap_bytes(64) == 8
    assert bitmap_bytes(65) == 16


def test_a_bitmap_with_bits_behind_the_last_page():
    with pytest.raises(
        StreamError, match=r"the bitmap of ram has bits behind the last page \(at"
    ) as e:
        decode_bitmap(a_block(3), b"\x0f" + bytes(7))
    assert e.value.offset == a_block(3).bitmap_offset


def test_a_bitmap_that_is_cut():
    with pytest.raises(StreamCut, match="The file ends in the bitmap of ram"):
        decode_bitmap(a_block(100), bytes(15))


BLOCKS = [("ram", 300 * PAGE), ("rom", 16 * PAGE)]
TOTAL = 316 * PAGE
HOSTILE = [
    ({"header_offset": 0}, None),  # not written, so it changes nothing
    ({"page_bytes": 8192}, "ram: pages of 8192 bytes; only 4096 are known"),
    ({"page_bytes": 0}, "ram: pages of 0 bytes; only 4096 are known"),
    ({"bitmap_offset": 0}, "ram: its bitmap at 0x0 would overlap its header"),
    ({"bitmap_offset": 2**64 - 1}, "ram: its pages at 0x100000 would overlap its bitmap"),
    ({"pages_offset": 0}, "ram: its pages at 0x0 would overlap its bitmap"),
    ({"pages_offset": MIB + 1}, "ram: its pages at 0x100001 are not aligned"),
    ({"pages_offset": 2**64 - PAGE}, "beyond the file of"),
    ({"size_bytes": 2**64 - PAGE}, "ram: its pages at 0x100000 would overlap its bitmap"),
    ({"size_bytes": 300 * PAGE + 1}, "ram: 0x12c001 bytes are no whole number of pages"),
    ({"size_bytes": 0}, "ram: 0x0 bytes are no whole number of pages"),
    ({"size_bytes": 301 * PAGE}, "The file ends|not UTF-8|header of version|add up to less"),
    ({"name": "rom"}, 'RAM block "rom" is listed twice'),
    ({"name": ""}, "RAM blocks add up to less than was promised"),
]


@pytest.mark.parametrize(("change", "says"), HOSTILE)
def test_hostile_entries(change, says):
    file, laid_out, end = file_of(BLOCKS, 100)
    file.write(100, encode_entry(replace(laid_out[0], **change)))
    if says is None:
        assert read_list(file.read, 100, TOTAL, file.size) == (laid_out, end)
        return
    with pytest.raises(StreamError, match=says) as error:
        read_list(file.read, 100, TOTAL, file.size)
    assert error.value.offset is not None
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", [0, 2, 0xFFFFFFFF])
def test_other_versions(version):
    file, laid_out, _ = file_of(BLOCKS, 100)
    header = laid_out[1].header_offset
    file.write(header, struct.pack(">I", version))
    with pytest.raises(StreamError, match=f"rom: mapped-ram header of version {version}") as error:
        read_list(file.read, 100, TOTAL, file.size)
    assert error.value.offset == header


@pytest.mark.parametrize("total", [TOTAL - PAGE, TOTAL - 1, PAGE])
def test_blocks_that_are_more_than_promised(total):
    file, _, _ = file_of(BLOCKS, 100)
    with pytest.raises(StreamError, match=f"RAM blocks add up to .* bytes, not {total:#x}"):
        read_list(file.read, 100, total, file.size)


def test_blocks_that_are_less_than_promised():
    file, _, end = file_of(BLOCKS, 100)
    file.write(end, struct.pack(">Q", 0x10))
    with pytest.raises(StreamError, match="RAM blocks add up to less than was promised") as error:
        read_list(file.read, 100, TOTAL + PAGE, file.size)
    assert error.value.offset == end


@given(st.integers(0, 1 << 22))
def test_a_file_that_is_cut_anywhere(size):
    file, _, end = file_of(BLOCKS, 100)
    file.size = min(size, end - 1)
    with pytest.raises(StreamError):
        read_list(file.read, 100, TOTAL, file.size)


@given(st.binary(min_size=0, max_size=400), st.integers(1, 2**64 - 1))
def test_rubbish_is_refused_without_taking_memory(data, total):
    file = SparseFile(len(data))
    file.write(0, data)
    with pytest.raises(StreamError):
        read_list(file.read, 0, total, file.size)


def test_a_block_knows_its_measures():
    block = MappedBlock("ram", 65 * PAGE, PAGE, 10, 38, MIB)
    assert (block.page_count, block.bitmap_bytes, block.end_offset) == (65, 16, MIB + 65 * PAGE)
