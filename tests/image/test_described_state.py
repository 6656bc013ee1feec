"""The state of devices is decoded as its description says, and a description that lies is refused."""

import pytest

from postcopy.errors import StreamError
from postcopy.stream import described_state
from postcopy.stream.described_state import decode_state, flatten


def device(*fields, **more):
    return {"fields": list(fields), **more}


def field(name, kind, size, **more):
    return {"name": name, "type": kind, "size": size, **more}


def test_numbers_texts_and_structures():
    inner = device(field("x", "uint16", 2), field("y", "int8", 1))
    described = device(
        field("a", "uint32", 4),
        field("b", "int32 equal", 4),
        field("on", "bool", 1),
        field("raw", "buffer", 2),
        field("all", "uint8", 1, array_len=3),
        field("one", "uint8", 1, index=0),
        field("one", "uint8", 1, index=1),
        field("s", "struct", 3, struct=inner),
        field("t", "tmp", 3, **inner),
    )
    payload = bytes.fromhex("00000102 fffffffe 01 beef 010203 04 05 0102ff 030400")
    values = decode_state(described, payload)
    assert values == {
        "a": 0x102,
        "b": -2,
        "on": True,
        "raw": "beef",
        "all": [1, 2, 3],
        "one": [4, 5],
        "s": {"x": 0x102, "y": -1},
        "t": {"x": 0x304, "y": 0},
    }
    assert dict(flatten(values))["all[1]"] == 2
    assert dict(flatten(values))["s.y"] == -1


def test_subsections_have_heads_of_their_own():
    child = device(field("x", "uint8", 1), vmsd_name="a/b", version=1)
    payload = b"\x07\x05\x03a/b\0\0\0\x01\x09"
    values = decode_state(device(field("a", "uint8", 1), subsections=[child]), payload)
    assert values == {"a": 7, "a/b": {"x": 9}}
    with pytest.raises(StreamError, match="'a/b' is described, but is not there"):
        decode_state(device(field("a", "uint8", 1), subsections=[child]), payload[:4])


@pytest.mark.parametrize(
    ("described", "why"),
    [
        (device(field("a", "uint8", 1)), "7 bytes are not described"),
        (device(field("a", "uint8", 9)), "'a' of 9 bytes"),
        (device(field("a", "uint8", 1, array_len=1 << 60)), "'a' of 1 bytes"),
        (device(field("a", "uint8", -1)), "'a' of -1 bytes"),
        (device(field("a", "struct", 8, struct=device(field("b", "uint8", 1)))), "other than 8"),
        (device({"name": "a"}), "makes no sense"),
        (device(field("a", "uint8", "many")), "makes no sense"),
        ({"fields": 7}, "makes no sense"),
        (device(field("a", "uint8", 0, array_len=1 << 60)), "8 bytes are not described"),
    ],
)
def test_what_cannot_be_is_refused(described, why):
    with pytest.raises(StreamError, match=why):
        decode_state(described, bytes(8))


def test_a_description_cannot_make_much_of_little(monkeypatch):
    monkeypatch.setattr(described_state, "MOST_VALUES", 1000)
    many = device(*[field(f"f{n}", "uint8", 0) for n in range(100)], field("x", "uint8", 1))
    with pytest.raises(StreamError, match="more than 1000 fields"):
        decode_state(device(field("a", "struct", 1, array_len=64, struct=many)), bytes(64))
    deep = device()
    for _ in range(100):
        deep = device(field("a", "struct", 0, struct=deep))
    with pytest.raises(StreamError, match="nested too deep"):
        decode_state(deep, b"")


def test_many_fields_of_one_name_take_time_by_their_number_only():
    """By its square, these would take minutes."""
    count = 200_000
    described = device(*[field("one", "uint8", 1, index=0)] * count)
    assert decode_state(described, bytes(count)) == {"one": [0] * count}
