"""Declared device formats: what is written is read, in pieces, and nothing unknown gets in."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import StreamCut, StreamError
from postcopy.stream.format_table import FormatTable
from postcopy.stream.vmstate import (
    BOOL,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Field,
    Format,
    Kind,
    Structure,
    buffer,
    pad,
)

FOOTER = b"\x7e\0\0\0\x07"
NUMBERS = (U8, U16, U32, U64, I32, I64)

PAIR = Structure("pair", (Field("low", U64), Field("gap", pad(2)), Field("high", U16)))
LAMP = Format(
    "lamp",
    3,
    (
        Field("colour", U32),
        Field("on", BOOL),
        Field("unused", pad(3)),
        Field("steps", I32, 4),
        Field("label", buffer(5)),
        Field("pairs", PAIR, 2),
        Field("main", PAIR),
    ),
    (
        Format("lamp/dim", 1, (Field("level", U8),), (Format("lamp/dim/curve", 2, ()),)),
        Format("lamp/timer", 1, (Field("at", I64),), needed=lambda values: values["at"] >= 0),
    ),
    minimum_version=2,
)
GLOBALSTATE = Format("globalstate", 1, (Field("size", U32),), minimum_version=1)


def lamp(**more):
    pair = {"low": 1, "high": 2}
    plain = {"colour": 7, "on": True, "steps": (1, -2, 3, -4), "label": b"table"}
    return plain | {"pairs": (pair, {"low": 3, "high": 4}), "main": pair} | more


def number(kind: Kind):
    low = -(1 << 8 * kind.size_bytes - 1) if kind in {I32, I64} else 0
    return st.integers(low, low + (1 << 8 * kind.size_bytes) - 1)


def values_of(field: Field):
    kind = field.kind
    if isinstance(kind, Structure):
        one = st.fixed_dictionaries({each.name: values_of(each) for each in kind.fields})
    elif kind.type_name == "buffer":
        one = st.binary(min_size=kind.size_bytes, max_size=kind.size_bytes)
    else:
        one = st.booleans() if kind is BOOL else number(kind)
    return one if field.count == 1 else st.tuples(*[one] * field.count)


@st.composite
def fields(draw, depth=2):
    names = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5, unique=True))
    made = []
    for name in names:
        kinds = st.sampled_from((*NUMBERS, BOOL, buffer(3)))
        if depth:
            kinds |= st.builds(lambda inner: Structure("s", inner), fields(depth - 1))
        made.append(Field(name, draw(kinds), draw(st.integers(1, 3))))
    return tuple(made)


@st.composite
def formats_with_values(draw):
    inner, outer = draw(fields()), draw(fields())
    format_ = Format("dev", 1, outer, (Format("dev/sub", 1, inner),))
    values = draw(st.fixed_dictionaries({each.name: values_of(each) for each in outer}))
    if draw(st.booleans()):
        values["dev/sub"] = draw(
            st.fixed_dictionaries({each.name: values_of(each) for each in inner})
        )
    return format_, values


@given(formats_with_values())
def test_what_is_encoded_is_decoded(made):
    format_, values = made
    payload = format_.encode(values)
    assert format_.decode(memoryview(payload), whole=True) == (values, len(payload))
    assert format_.decode(memoryview(payload + FOOTER)) == (values, len(payload))


@given(formats_with_values())
def test_a_part_is_never_taken_for_the_whole(made):
    format_, values = made
    payload = format_.encode(values)
    for length in range(len(payload) + 1):
        assert format_.decode(memoryview(payload)[:length]) is None


@given(st.binary(max_size=120))
def test_no_bytes_do_anything_but_decode_or_be_refused(data):
    try:
        found = LAMP.decode(memoryview(data))
    except StreamError:
        return
    assert found is None or 0 < found[1] <= len(data)


def test_the_bytes_are_big_endian_and_padding_is_zero():
    plain = struct.pack(">I?3x4i5s", 7, True, 1, -2, 3, -4, b"table")
    pairs = struct.pack(">Q2xHQ2xHQ2xH", 1, 2, 3, 4, 1, 2)
    assert LAMP.encode(lamp()) == plain + pairs
    assert LAMP.length == len(plain + pairs)


def test_subsections_follow_with_their_names_and_may_nest():
    dimmed = lamp(**{"lamp/dim": {"level": 9, "lamp/dim/curve": {}}, "lamp/timer": {"at": 5}})
    payload = LAMP.encode(dimmed)
    assert payload[LAMP.length :] == (
        b"\x05\x08lamp/dim\0\0\0\x01\x09"
        b"\x05\x0elamp/dim/curve\0\0\0\x02"
        b"\x05\x0alamp/timer\0\0\0\x01" + bytes(7) + b"\x05"
    )
    assert LAMP.decode(memoryview(payload), whole=True) == (dimmed, len(payload))


def test_a_subsection_that_is_not_needed_stays_at_home():
    assert LAMP.encode(lamp(**{"lamp/timer": {"at": -1}})) == LAMP.encode(lamp())


def test_an_unknown_subsection_is_refused_by_name():
    payload = LAMP.encode(lamp()) + b"\x05\x0blamp/shadow\0\0\0\x01"
    with pytest.raises(StreamError, match="lamp: unknown subsection 'lamp/shadow'"):
        LAMP.decode(memoryview(payload))


def test_what_follows_and_is_not_ours_ends_the_payload():
    payload = LAMP.encode(lamp())
    for behind in (FOOTER, b"\0", b"\x05\x04desk\0\0\0\x01"):
        assert LAMP.decode(memoryview(payload + behind)) == (lamp(), len(payload))


def test_versions_are_refused_in_qemus_words():
    with pytest.raises(StreamError, match=r"^savevm: unsupported version 2 for 'globalstate' v1$"):
        GLOBALSTATE.check_version(2)
    old = r"^globalstate: incoming version_id 0 is too old for local minimum version_id  1$"
    with pytest.raises(StreamError, match=old):
        GLOBALSTATE.decode(memoryview(b"abcd"), version=0)


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="lamp: cannot be written: 'colour'"):
        LAMP.encode({})
    with pytest.raises(ValueError, match="lamp: cannot be written"):
        LAMP.encode(lamp(colour=1 << 32))
    with pytest.raises(ValueError, match="steps has 2 elements instead of 4"):
        LAMP.encode(lamp(steps=(1, 2)))


def test_a_description_has_the_shape_of_qemus():
    described = LAMP.describe(lamp(**{"lamp/dim": {"level": 9}}))
    assert (described["vmsd_name"], described["version"]) == ("lamp", 3)
    by_name = {field["name"]: field for field in described["fields"]}
    assert by_name["colour"] == {"name": "colour", "type": "uint32", "size": 4}
    assert by_name["unused"] == {"name": "unused", "type": "unused_buffer", "size": 3}
    assert by_name["steps"] == {"name": "steps", "array_len": 4, "type": "int32", "size": 4}
    assert by_name["pairs"]["struct"]["vmsd_name"] == "pair"
    assert [each["vmsd_name"] for each in described["subsections"]] == ["lamp/dim"]


TABLE = FormatTable((GLOBALSTATE,), per_cpu=(LAMP,))


def test_a_table_tells_lengths_and_refuses_strangers():
    payload = LAMP.encode(lamp())
    assert TABLE.payload_length("lamp", 3, 3, memoryview(payload + FOOTER)) == len(payload)
    assert TABLE.payload_length("lamp", 3, 3, memoryview(payload)) is None
    for name, instance in (("serial", 0), ("globalstate", 1)):
        unknown = f"Unknown savevm section or instance '{name}' {instance}. Make sure that"
        with pytest.raises(StreamError, match=unknown):
            TABLE.payload_length(name, instance, 1, memoryview(b""))


def test_a_table_takes_whole_payloads_only():
    payload = GLOBALSTATE.encode({"size": 4})
    assert TABLE.decode("globalstate", 0, 1, payload) == {"size": 4}
    with pytest.raises(StreamCut, match="3 bytes are too few"):
        TABLE.decode("globalstate", 0, 1, payload[:3])
    with pytest.raises(StreamError, match="5 bytes are more"):
        TABLE.decode("globalstate", 0, 1, payload + b"\0")
