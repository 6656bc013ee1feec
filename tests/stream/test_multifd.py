"""Channels of multifd: every page comes out where it belongs, and wrong packets are named."""

import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard

from fakes.multifd import FLAGS, PAGE, ChannelWriter, initial
from postcopy.errors import StreamCut, StreamError
from postcopy.stream.layout import BlockLayout
from postcopy.stream.multifd import (
    HEADER_BYTES,
    INITIAL_BYTES,
    PACKET_BYTES,
    MultifdDecoder,
    MultifdInitial,
    MultifdSync,
)
from postcopy.stream.records import Pages, ZeroPages

BLOCKS = {"ram": 600, "rom": 16}
LAYOUT = {name: BlockLayout(pages * PAGE) for name, pages in BLOCKS.items()}
CHANCE = np.random.default_rng(3)
RAM = CHANCE.integers(0, 256, (600, PAGE), dtype=np.uint8)
RAM[100:300] %= 3  # something that compresses


def read_all(raw: bytes, piece: int | None = None):
    """Feed a channel, in pieces or as much as it wants; yields each record, its pages copied."""
    decoder = MultifdDecoder(lambda: LAYOUT)
    at = 0
    while at < len(raw):
        count = min(piece or decoder.wanted, len(raw) - at)
        decoder.feed(raw[at : at + count])
        at += count
        while (record := decoder.next_record()) is not None:
            if isinstance(record, Pages):
                record = (record.block, record.offsets.tolist(), record.data.copy())
            yield record
    decoder.finish()


def pages_of(*numbers):
    return [(number * PAGE, RAM[number]) for number in numbers]


@pytest.mark.parametrize("piece", [None, 1000, 70_000, 1 << 22])
@pytest.mark.parametrize("compression", FLAGS)
def test_pages_come_out_where_they_belong(compression, piece):
    writer = ChannelWriter(compression)
    raw = initial(3, b"u" * 16)
    memory = np.full_like(RAM, 7)
    wanted = np.full_like(RAM, 7)
    order = random.Random(1).sample(range(600), 600)
    while order:
        now, order = order[:128], order[128:]
        data, zeros = (now[:90], now[90:]) if len(order) % 256 else (now, [])
        raw += writer.packet("ram", pages_of(*data), [each * PAGE for each in zeros])
        wanted[data], wanted[zeros] = RAM[data], 0
    raw += writer.packet(sync=True)
    records = list(read_all(raw, piece))
    assert records[0] == MultifdInitial(b"u" * 16, 3)
    assert records[-1] == MultifdSync(5)
    for record in records[1:-1]:
        if isinstance(record, ZeroPages):
            memory[(record.offsets // PAGE).astype(int)] = 0
        else:
            block, offsets, data = record
            assert block == "ram"
            memory[[offset // PAGE for offset in offsets]] = data
    np.testing.assert_array_equal(memory, wanted)


def test_pages_come_before_the_sync_of_their_packet():
    # As QEMU 7.2 sends them, and an empty packet of the same number behind it.
    writer = ChannelWriter()
    raw = initial() + writer.packet("rom", pages_of(1), [0], sync=True) + writer.packet()
    kinds = [type(each) for each in read_all(raw)]
    assert kinds == [MultifdInitial, tuple, ZeroPages, MultifdSync]


def test_a_size_without_pages_means_nothing():
    # QEMU 7.2 leaves there what it had in the packet before.
    raw = initial() + changed(20, ">I", 524288, ChannelWriter().packet(sync=True))
    assert list(read_all(raw))[1:] == [MultifdSync(0)]


def test_neighbours_are_known():
    decoder = MultifdDecoder(lambda: LAYOUT)
    writer = ChannelWriter()
    packets = writer.packet("ram", pages_of(5, 6, 7)) + writer.packet("ram", pages_of(5, 7))
    decoder.feed(initial() + packets)
    decoder.next_record()
    assert [decoder.next_record().neighbours for _ in range(2)] == [True, False]


def changed(at: int, form: str, value: int, packet: bytes | None = None) -> bytes:
    """A packet of 2 pages and a zero page with a number in its header changed."""
    whole = bytearray(packet or ChannelWriter().packet("ram", pages_of(0, 1), [2 * PAGE]))
    struct.pack_into(form, whole, at, value)
    return bytes(whole)


ZLIB = ChannelWriter("zlib").packet("ram", pages_of(0, 1))
REFUSED = {
    "magic": (changed(0, ">I", 5), 0, "received packet magic 5 expected magic 11223344"),
    "version": (changed(4, ">I", 2), 4, "received packet version 2 expected version 1"),
    "device state": (changed(8, ">I", 0x40), 8, "device state (VFIO) is not supported"),
    "flags": (changed(8, ">I", 0x80), 8, "unknown flags 0x80"),
    "qpl": (changed(8, ">I", 8), 8, "compression qpl is not supported; set multifd-compression"),
    "two at once": (changed(8, ">I", 6), 8, "unknown compression 0x6"),
    "slots": (changed(12, ">I", 129), 12, "packet of 129 pages; at most 128 are taken"),
    "pages": (changed(16, ">I", 1 << 31), 16, "2147483648 pages and 1 zero pages"),
    "zeros": (changed(32, ">I", 127), 16, "2 pages and 127 zero pages"),
    "size": (changed(20, ">I", 8191), 20, "8191 bytes of data for 2 pages"),
    "compressed size": (changed(20, ">I", 1 << 31, ZLIB), 20, "2147483648 bytes of data"),
    "no name": (changed(64, ">I", 0), 64, "unknown ram block "),
    "name": (changed(64, ">I", 0x7A7A7A00), 64, "unknown ram block zzz"),
    "not aligned": (changed(HEADER_BYTES, ">Q", 8), HEADER_BYTES, "outside of block ram: 8"),
    "outside": (changed(HEADER_BYTES + 8, ">Q", 600 * PAGE), HEADER_BYTES + 8, "ram: 258000"),
    "far outside": (changed(HEADER_BYTES + 16, ">Q", 1 << 63), HEADER_BYTES + 16, "ram: 80000"),
    "other compression": (
        ChannelWriter().packet("ram", pages_of(3)) + ZLIB,
        PACKET_BYTES + PAGE + 8,
        "flags received 2 flags expected 0",
    ),
    "no zlib": (
        changed(8, ">I", 2), PACKET_BYTES, "zlib: Error -3",
    ),
    "no zstd": (
        changed(8, ">I", 4), PACKET_BYTES, "zstd decompress error",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("packet", "offset", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_packets_are_refused_by_name_and_offset(packet, offset, text):
    with pytest.raises(StreamError) as caught:
        list(read_all(initial() + packet))
    assert text in caught.value.message
    assert caught.value.message.startswith("multifd: ")
    assert caught.value.offset == INITIAL_BYTES + offset


@pytest.mark.parametrize("n_zeros", [1, 127, 128])
@pytest.mark.parametrize("count", [1, 2, 3, 130])
@pytest.mark.parametrize("piece", [None, 1000, 5 * PACKET_BYTES, 1 << 22])
def test_packets_of_zero_pages(n_zeros, count, piece):
    """Many are read at once, and nothing of what stands between them is lost."""
    writer = ChannelWriter()
    chance = random.Random(n_zeros)
    zeros = [[page * PAGE for page in chance.sample(range(600), n_zeros)] for _ in range(count)]
    other = [0, PAGE]
    raw = initial() + b"".join(writer.packet("ram", zeros=each) for each in zeros)
    raw += writer.packet("rom", zeros=other) + writer.packet("rom", pages_of(3), other)
    raw += writer.packet("ram", pages_of(1, 2)) + writer.packet("ram", zeros=other)
    raw += writer.packet("ram", zeros=other, sync=True) + writer.packet("ram", zeros=other)
    found = {"ram": [], "rom": []}
    kinds = []
    for record in read_all(raw, piece):
        if isinstance(record, ZeroPages):
            found[record.block] += record.offsets.tolist()
        kinds.append(type(record))
    assert found["rom"] == 2 * other
    assert found["ram"] == [offset for each in zeros for offset in each] + 3 * other
    assert kinds[-3:] == [ZeroPages, MultifdSync, ZeroPages]
    assert kinds.count(tuple) == 2


def test_packets_of_zero_pages_come_in_few_records():
    writer = ChannelWriter()
    raw = b"".join(writer.packet("ram", zeros=range(0, 128 * PAGE, PAGE)) for _ in range(130))
    assert sum(type(record) is ZeroPages for record in read_all(initial() + raw)) <= 5


@pytest.mark.parametrize("name", ["magic", "version", "device state", "flags", "slots", "pages",
                                  "zeros", "no name", "name", "not aligned", "outside"])  # fmt: skip
@pytest.mark.parametrize("before", [2, 5])
def test_a_wrong_packet_among_those_of_zero_pages(name, before):
    good = [ChannelWriter().packet("ram", zeros=[0, PAGE]) for _ in range(before)]
    packet, offset, text = REFUSED[name]
    if name in {"pages", "zeros"}:
        wrong = packet
    else:
        wrong = bytearray(good[0])
        wrong[offset : offset + 4] = packet[offset : offset + 4]
        if offset >= HEADER_BYTES:
            wrong[offset + 4 : offset + 8] = packet[offset + 4 : offset + 8]
    with pytest.raises(StreamError) as caught:
        list(read_all(b"".join([initial(), *good, bytes(wrong), *good])))
    assert (
        text.replace("2 pages", "0 pages") in caught.value.message or text in caught.value.message
    )
    assert caught.value.offset == INITIAL_BYTES + before * PACKET_BYTES + offset


def bomb(compression: str, size: int) -> bytes:
    if compression == "zlib":
        return zlib.compress(bytes(size), 9)
    return zstandard.ZstdCompressor(19).compress(bytes(size))


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("size", [4097, 64 << 20])
def test_more_than_the_pages_of_a_packet_is_never_unpacked(compression, size):
    data = bomb(compression, size)
    packet = ChannelWriter().packet("ram", pages_of(0))[:PACKET_BYTES]
    packet = changed(20, ">I", len(data), changed(8, ">I", FLAGS[compression], packet)) + data
    tracemalloc.start()
    try:
        with pytest.raises(StreamError, match="are more than 4096 bytes of pages"):
            list(read_all(initial() + packet))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_fewer_than_the_pages_of_a_packet_are_refused(compression):
    packet = changed(16, ">I", 2, ChannelWriter(compression).packet("ram", pages_of(0)))
    with pytest.raises(StreamError, match="4096 bytes of pages in place of 8192"):
        list(read_all(initial() + packet))


@pytest.mark.parametrize("compression", FLAGS)
def test_a_channel_that_ends_in_a_packet(compression):
    raw = initial() + ChannelWriter(compression).packet("ram", pages_of(0, 1))
    for end in (0, 10, INITIAL_BYTES + 5, INITIAL_BYTES + PACKET_BYTES, len(raw) - 1):
        with pytest.raises(StreamCut, match="ends in a packet"):
            list(read_all(raw[:end]))


@pytest.mark.parametrize("compression", FLAGS)
def test_mutations_are_survived(compression):
    chance = random.Random(compression)
    writer = ChannelWriter(compression)
    good = initial() + b"".join(
        writer.packet("ram", pages_of(*range(n, n + 4)), [9 * PAGE], sync=n == 8) for n in (0, 4, 8)
    )
    for _ in range(500):
        raw = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(INITIAL_BYTES + 100) if chance.random() < 0.5 else chance.randrange(
                len(raw)
            )  # fmt: skip
            raw[at] = chance.randrange(256)
        try:
            list(read_all(bytes(raw[: chance.randrange(len(raw))] if at % 9 == 0 else raw)))
        except StreamError:
            pass
