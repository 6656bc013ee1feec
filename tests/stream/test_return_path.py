"""Messages of the return path come out as they went in; wrong ones are refused by name."""

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.streams import LAYOUT, PAGE
from postcopy.errors import StreamCut, StreamError
from postcopy.stream.layout import BlockLayout
from postcopy.stream.records import (
    Pong,
    RecvBitmapReply,
    RequestPages,
    ResumeAck,
    Shut,
    SwitchoverAck,
)
from postcopy.stream.return_path import ReturnPathDecoder, encode_message

words = st.integers(0, 2**32 - 1)
blocks = st.sampled_from(sorted(LAYOUT))
requests = st.builds(
    lambda block, first, count: RequestPages(block, first * PAGE, count * PAGE),
    st.one_of(st.none(), blocks),
    st.integers(0, 8),
    st.integers(1, 8),
)
bitmaps = blocks.flatmap(
    lambda block: st.lists(
        st.booleans(),
        min_size=LAYOUT[block].size_bytes // PAGE,
        max_size=LAYOUT[block].size_bytes // PAGE,
    ).map(lambda bits: RecvBitmapReply(block, np.array(bits)))
)
messages = st.one_of(
    st.builds(Shut, words),
    st.builds(Pong, words),
    st.just(ResumeAck()),
    st.just(SwitchoverAck()),
    requests,
    bitmaps,
)


def comparable(found):
    for message in found:
        if isinstance(message, RecvBitmapReply):
            yield message.block, message.bitmap.tolist()
        else:
            yield message


def resolved(sent):
    block = "ram"
    for message in sent:
        if isinstance(message, RequestPages):
            block = message.block or block
            yield RequestPages(block, message.start, message.length_bytes)
        else:
            yield message


def decode(raw, cuts=(), layout=LAYOUT):
    decoder = ReturnPathDecoder(layout)
    found = []
    edges = [0, *sorted(cuts), len(raw)]
    for begin, end in itertools.pairwise(edges):
        free = decoder.buffer()
        free[: end - begin] = raw[begin:end]
        decoder.received(end - begin)
        while (message := decoder.next_message()) is not None:
            found.append(message)
    return found


@settings(max_examples=100, deadline=None)
@given(st.lists(messages, max_size=10), st.data())
def test_any_messages_in_any_pieces(sent, data):
    sent = [RequestPages("ram", 0, PAGE), *sent]
    raw = b"".join(map(encode_message, sent))
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=10))
    assert list(comparable(decode(raw, cuts))) == list(comparable(resolved(sent)))


def test_bitmap_is_in_little_endian_words():
    bitmap = np.zeros(70, bool)
    bitmap[[0, 9, 69]] = True
    raw = encode_message(RecvBitmapReply("ram", bitmap))
    assert raw == (
        bytes.fromhex("00050004") + b"\3ram" + struct.pack(">Q", 16)
        + bytes([1, 2, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0])
        + bytes.fromhex("0123456789abcdef")
    )  # fmt: skip
    (reply,) = decode(raw, layout={"ram": BlockLayout(70 * PAGE)})
    assert (reply.bitmap == bitmap).all()


def test_bitmap_of_a_large_block_outgrows_the_buffer():
    layout = {"ram": BlockLayout(1 << 33)}
    bitmap = np.random.default_rng(0).integers(0, 2, 1 << 21).astype(bool)
    decoder = ReturnPathDecoder(layout)
    decoder.feed(encode_message(RecvBitmapReply("ram", bitmap)) + encode_message(Pong(1)))
    assert (decoder.next_message().bitmap == bitmap).all()
    assert decoder.next_message() == Pong(1)


def bitmap_message(size=8, end=0x0123456789ABCDEF, name=b"\3rom"):
    head = struct.pack(">HH", 5, len(name)) + name
    return head + struct.pack(">Q", size) + bytes(8) + struct.pack(">Q", end)


WRONG = {
    "type 0": (b"\0\0\0\0", "RP: Received invalid message 0x0000 length 0x0000"),
    "type 8": (b"\0\x08\0\4", "RP: Received invalid message 0x0008 length 0x0004"),
    "length": (b"\0\1\0\5", "RP: Received 'SHUT' message (0x0001) with incorrect length 5 expect"),
    "too long": (b"\0\3\2\1", "'REQ_PAGES_ID' message (0x0003) with incorrect length 513 expectin"),
    "id without name": (b"\0\3\0\x0c" + bytes(12), "incorrect length 12 expecting more than 12"),
    "id too short": (b"\0\3\0\5" + bytes(5), "incorrect length 5 expecting more than 12"),
    "no block before": (b"\0\4\0\x0c" + bytes(12), "request for the same block as before"),
    "name length": (b"\0\3\0\x10" + bytes(12) + b"\2ram", "does not fill the payload"),
    "unknown": (encode_message(RequestPages("x", 0, PAGE)), "RP: no block 'x'"),
    "misaligned": (
        encode_message(RequestPages("ram", 100, PAGE)),
        "migrate_handle_rp_req_pages: Misaligned page request, block 'ram' start: 0x64 len: 4096",
    ),
    "misaligned length": (encode_message(RequestPages("ram", 0, 100)), "Misaligned page request"),
    "nothing": (encode_message(RequestPages("ram", 0, 0)), "Misaligned page request"),
    "overrun": (
        encode_message(RequestPages("ram", 64 * PAGE, PAGE)),
        "ram_save_queue_pages: request overrun, block 'ram' start: 0x40000 len: 4096 blocklen=0x4",
    ),
    "bitmap size": (bitmap_message(size=16), "ramblock 'rom' bitmap size mismatch (0x10 != 0x8)"),
    "bitmap end": (bitmap_message(end=1), "ramblock 'rom' end mark incorrect: 0x0000000000000001"),
    "bitmap of nothing": (b"\0\5\0\0", "does not fill the payload"),
    "resume": (encode_message(ResumeAck(2)), "migrate_handle_rp_resume_ack: illegal resume_ack"),
}


@pytest.mark.parametrize("what", WRONG)
def test_refused(what):
    raw, text = WRONG[what]
    with pytest.raises(StreamError) as caught:
        decode(raw)
    assert not isinstance(caught.value, StreamCut)
    assert text in caught.value.message


def test_huge_pages_are_asked_for_whole():
    layout = {"ram": BlockLayout(4 << 20, 2 << 20)}
    good = RequestPages("ram", 2 << 20, 2 << 20)
    assert decode(encode_message(good), layout=layout) == [good]
    with pytest.raises(StreamError, match="Misaligned"):
        decode(encode_message(RequestPages("ram", 4096, 4096)), layout=layout)
