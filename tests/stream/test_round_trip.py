"""Any sequence of records, cut into any pieces, comes out as it went in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.streams import (
    LAYOUT,
    PAGE,
    SECTION,
    SETUP,
    SOURCES,
    START,
    Writer,
    decode,
    device,
    drain,
    flat,
    new_decoder,
    offsets,
    part,
)
from postcopy.errors import StreamCut
from postcopy.stream.decoder import PreemptDecoder
from postcopy.stream.encoder import end_of_stream, ram_setup, stream_start
from postcopy.stream.layout import BlockLayout, Expected, Limits
from postcopy.stream.numbers import SectionType
from postcopy.stream.ram_encoder import PageEncoder
from postcopy.stream.records import (
    BlockEntry,
    Configuration,
    Description,
    EndOfStream,
    OpenReturnPath,
    Package,
    Pages,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamBody,
    RamBodyEnd,
    RamDiscard,
    RamSetup,
    RecvBitmap,
    SwitchoverStart,
    ZeroPages,
)

blocks = st.sampled_from(sorted(LAYOUT))


@st.composite
def runs(draw):
    block = draw(blocks)
    last = LAYOUT[block].size_bytes // PAGE - 1
    indices = st.one_of(
        st.lists(st.integers(0, last), min_size=1, max_size=20),
        st.tuples(st.integers(0, last - 1), st.integers(1, last)).map(
            lambda pair: list(range(pair[0], min(pair[0] + pair[1], last + 1)))
        ),
    )
    where = offsets(*draw(indices))
    if draw(st.booleans()):
        return ZeroPages(block, where)
    return Pages(block, where, SOURCES[block][(where // np.uint64(PAGE)).astype(int)])


@st.composite
def bodies(draw):
    kind = draw(st.sampled_from([SectionType.PART, SectionType.END]))
    return [RamBody(kind), *draw(st.lists(runs(), max_size=6)), RamBodyEnd(kind)]


@st.composite
def discards(draw):
    block = draw(blocks)
    last = LAYOUT[block].size_bytes // PAGE
    ranges = draw(st.lists(st.integers(0, last - 1), min_size=1, max_size=5))
    return RamDiscard(block, tuple((first * PAGE, (last - first) * PAGE) for first in ranges))


words = st.integers(0, 2**32 - 1)
others = st.one_of(
    st.just(OpenReturnPath()),
    st.just(PostcopyListen()),
    st.just(PostcopyRun()),
    st.just(PostcopyResume()),
    st.just(SwitchoverStart()),
    words.map(Ping),
    discards(),
    st.binary(max_size=300).map(Package),
    blocks.map(RecvBitmap),
    st.builds(device, st.binary(max_size=255), words),
).map(lambda record: [record])
streams = st.builds(
    lambda early, middle, text: [
        Configuration("none"),
        *(record for record in early if not isinstance(record, PostcopyAdvise)),
        PostcopyAdvise(4096, 4096),
        SETUP,
        *(record for group in middle for record in group),
        EndOfStream(),
        Description(text),
    ],
    st.lists(others.map(lambda group: group[0]), max_size=3),
    st.lists(st.one_of(bodies(), others), max_size=8),
    st.text(max_size=30),
)


@settings(max_examples=60, deadline=None)
@given(streams, st.data())
def test_any_records_in_any_pieces(records, data):
    raw = Writer().write(records)
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=12))
    decoder = new_decoder()
    assert decode(raw, decoder, cuts) == list(flat(records))
    assert decoder.position == len(raw)
    assert decoder.finished
    decoder.finish()


def test_byte_by_byte():
    page = Pages("ram", offsets(3), SOURCES["ram"][3:4])
    records = [
        Configuration("none", 12, (), b"u" * 16),
        SETUP,
        device(b"abc"),
        RamBody(SectionType.PART),
        page,
        ZeroPages("ram", offsets(1, 2)),
        RamBodyEnd(SectionType.PART),
        RamDiscard("rom", ((0, PAGE),)),
        Package(b"xyz"),
        EndOfStream(),
        Description("{}"),
    ]
    raw = Writer().write(records)
    decoder = new_decoder()
    assert decode(raw, decoder, range(len(raw))) == list(flat(records))


def test_a_page_is_handed_out_as_soon_as_it_is_there():
    encoder = PageEncoder()
    first = bytes(encoder.pages("ram", offsets(1, 2), SOURCES["ram"]))
    decoder = new_decoder()
    decoder.feed(START + ram_setup(SETUP, postcopy=False) + part(first)[:-13])
    found = drain(decoder)
    assert [entry[2] for entry in found if isinstance(entry, tuple)] == [PAGE, 2 * PAGE]
    assert decoder.next_record() is None


def test_pages_come_in_batches_of_the_limit():
    encoder = PageEncoder(64)
    raw = START + ram_setup(SETUP, postcopy=False)
    raw += part(bytes(encoder.pages("ram", offsets(*range(64)), SOURCES["ram"])))
    decoder = new_decoder(limits=Limits(pages_per_record=10))
    decoder.feed(raw)
    sizes = []
    while (record := decoder.next_record()) is not None:
        if isinstance(record, Pages):
            sizes.append(len(record.offsets))
    assert sizes == [1, 10, 10, 10, 10, 10, 10, 3]


def test_package_ends_at_run():
    records = [PostcopyListen(), device(b"x"), Ping(3), PostcopyRun()]
    decoder = new_decoder(package=True)
    assert decode(Writer().write(records) + b"anything", decoder) == records
    assert decoder.finished
    decoder.finish()


def test_package_without_run_is_cut():
    decoder = new_decoder(package=True)
    assert decode(Writer().write([PostcopyListen()]), decoder) == [PostcopyListen()]
    assert not decoder.finished
    with pytest.raises(StreamCut):
        decoder.finish()


def test_resume_drops_halves_and_keeps_what_was_agreed():
    encoder = PageEncoder()
    whole = part(bytes(encoder.pages("ram", offsets(5), SOURCES["ram"])))
    decoder = new_decoder()
    decode(START + ram_setup(SETUP, postcopy=False) + whole[:100], decoder)
    decoder.resume()
    assert decoder.ram_section_id == SECTION
    found = decode(Writer().write([RecvBitmap("ram"), PostcopyResume()]) + whole, decoder)
    assert found[:2] == [RecvBitmap("ram"), PostcopyResume()]
    assert found[3] == ("page", "ram", 5 * PAGE, SOURCES["ram"][5].tobytes())


def test_resume_of_a_decoder_that_saw_nothing():
    decoder = new_decoder()
    decoder.resume(SECTION)
    assert decode(part() + end_of_stream(), decoder)[-1] == EndOfStream()
    decoder.finish()


def test_ignored_blocks_are_listed_and_their_pages_dropped():
    encoder = PageEncoder()
    bios = np.ones((4, PAGE), np.uint8)
    setup = RamSetup(SECTION, (*SETUP.blocks, BlockEntry("pc.bios", 4 * PAGE)))
    body = part(
        bytes(encoder.pages("pc.bios", offsets(0, 1, 2), bios)),
        encoder.zeros("pc.bios", offsets(3, 3)),
        encoder.zeros("ram", offsets(9, 8)),
        encoder.zeros("pc.bios", offsets(0)),
    )
    discard = Writer().write([RamDiscard("pc.bios", ((0, PAGE),)), RecvBitmap("pc.bios")])
    decoder = new_decoder(ignored_blocks=["pc.bios"])
    found = decode(START + ram_setup(setup, postcopy=False) + body + discard, decoder)
    assert found[1:] == [
        setup,
        RamBody(SectionType.PART),
        ("zero", "ram", 9 * PAGE),
        ("zero", "ram", 8 * PAGE),
        RamBodyEnd(SectionType.PART),
        RecvBitmap("pc.bios"),
    ]


@pytest.mark.parametrize("advised", [True, False])
def test_huge_page_blocks_say_so_only_under_postcopy(advised):
    huge = 2 << 20
    layout = {"ram": BlockLayout(2 * huge, huge), "rom": BlockLayout(PAGE)}
    entries = (BlockEntry("ram", 2 * huge, huge if advised else None), BlockEntry("rom", PAGE))
    raw = START
    if advised:
        raw += Writer().write([PostcopyAdvise(huge | PAGE, PAGE)])
    raw += ram_setup(RamSetup(1, entries), postcopy=advised)
    decoder = new_decoder()
    decoder = type(decoder)(None, layout)
    assert decode(raw, decoder)[-1] == RamSetup(1, entries)


def test_ignore_shared_sends_addresses():
    capabilities = ("x-ignore-shared",)
    entries = tuple(BlockEntry(b.name, b.size_bytes, None, 0x1000) for b in SETUP.blocks)
    raw = stream_start(Configuration("none", None, capabilities))
    raw += ram_setup(RamSetup(1, entries), postcopy=False, addresses=True)
    decoder = new_decoder(expect=Expected(capabilities=frozenset(capabilities)))
    assert decode(raw, decoder)[-1] == RamSetup(1, entries)


@settings(max_examples=40, deadline=None)
@given(st.lists(runs(), max_size=8), st.data())
def test_preempt_channel(records, data):
    raw = Writer().write(records) + b"\0\0\0\0\0\0\0\x10"
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=8))
    decoder = PreemptDecoder(LAYOUT)
    assert decode(raw, decoder, cuts) == list(flat(records))
    decoder.finish()


def test_preempt_channel_cut_in_a_page():
    encoder = PageEncoder()
    raw = bytes(encoder.pages("ram", offsets(5), SOURCES["ram"]))
    decoder = PreemptDecoder(LAYOUT)
    assert decode(raw[:-1], decoder) == []
    with pytest.raises(StreamCut, match="ends in a requested page"):
        decoder.finish()
