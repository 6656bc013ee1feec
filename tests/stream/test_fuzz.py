"""Wrong bytes give a StreamError or nothing, and no more memory than the bounds."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.streams import LAYOUT, PAGE, SETUP, SOURCES, Writer, decode, device, new_decoder, offsets
from postcopy.errors import StreamError
from postcopy.stream.decoder import PreemptDecoder
from postcopy.stream.layout import Limits
from postcopy.stream.numbers import SectionType
from postcopy.stream.reader import CAPACITY_BYTES
from postcopy.stream.records import (
    Configuration,
    Description,
    EndOfStream,
    OpenReturnPath,
    Package,
    Pages,
    Ping,
    PostcopyAdvise,
    RamBody,
    RamBodyEnd,
    RamDiscard,
    ZeroPages,
)
from postcopy.stream.return_path import ReturnPathDecoder

LIMITS = Limits(package_bytes=4096, description_bytes=4096, device_bytes=4096)
GOOD = Writer().write(
    [
        Configuration("none", 12),
        OpenReturnPath(),
        Ping(1),
        PostcopyAdvise(4096, 4096),
        SETUP,
        RamBody(SectionType.PART),
        ZeroPages("rom", offsets(0, 1, 2)),
        Pages("ram", offsets(7, 8), SOURCES["ram"][7:9]),
        RamBodyEnd(SectionType.PART),
        RamDiscard("ram", ((0, PAGE), (PAGE, PAGE))),
        device(b"state"),
        Package(b"package"),
        EndOfStream(),
        Description("{}"),
    ]
)


def survive(raw: bytes, decoder) -> None:
    try:
        decode(raw, decoder, range(0, len(raw), 1000))
        decoder.finish()
    except StreamError:
        pass
    assert len(decoder._reader._array) <= 2 * CAPACITY_BYTES


@pytest.mark.parametrize("seed", range(40))
def test_mutations(seed):
    chance = random.Random(seed)
    for _ in range(15):
        raw = bytearray(GOOD)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(raw)) if chance.random() < 0.3 else chance.randrange(300)
            match chance.randrange(4):
                case 0:
                    raw[at] = chance.randrange(256)
                case 1:
                    raw[at] ^= 1 << chance.randrange(8)
                case 2:
                    del raw[at : at + chance.randint(1, 9)]
                case _:
                    raw[at:at] = chance.randbytes(chance.randint(1, 9))
        survive(bytes(raw), new_decoder(limits=LIMITS))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes(raw):
    survive(raw, new_decoder(limits=LIMITS))
    survive(raw, new_decoder(limits=LIMITS, package=True))
    survive(GOOD[:94] + raw, new_decoder(limits=LIMITS))
    survive(raw, PreemptDecoder(LAYOUT))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_on_the_return_path(raw):
    decoder = ReturnPathDecoder(LAYOUT)
    decoder.feed(raw)
    try:
        while decoder.next_message() is not None:
            pass
    except StreamError:
        pass
