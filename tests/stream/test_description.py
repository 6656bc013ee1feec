"""Descriptions are written so that sections can be cut by them, and nonsense is refused."""

import json

import pytest

from postcopy.errors import StreamError
from postcopy.stream.configuration import encode_configuration
from postcopy.stream.description import (
    DescribedFormats,
    build_description,
    described_bytes,
    parse_description,
)
from postcopy.stream.records import Configuration

DEVICES = [
    {"name": "timer", "instance_id": 0, "version": 2, "fields": [{"name": "data", "size": 4}]},
    {"name": "apic", "instance_id": 1, "version": 3, "fields": []},
]
PARSED = parse_description(build_description(Configuration("none"), DEVICES))


def test_what_is_built_can_be_read():
    assert PARSED["devices"] == DEVICES
    assert PARSED["page_size"] == 4096
    assert [field["size"] for field in PARSED["configuration"]["fields"]] == [4, 4]


def test_fields_arrays_and_subsections_add_up():
    inner = {"vmsd_name": "a/b/c", "fields": [{"size": 1}]}
    child = {"vmsd_name": "a/b", "fields": [{"size": 8}], "subsections": [inner]}
    whole = {"fields": [{"size": 4}, {"size": 2, "array_len": 5}], "subsections": [child]}
    assert described_bytes(whole) == 4 + 10 + (6 + 3 + 8) + (6 + 5 + 1)


def test_formats_know_the_described_sections_only():
    formats = DescribedFormats(PARSED)
    assert formats.payload_length("timer", 0, 2, memoryview(b"")) == 4
    with pytest.raises(StreamError, match="section 'timer' 1 is not in the description"):
        formats.payload_length("timer", 1, 2, memoryview(b""))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"devices": 1}', "[" * 100_000])
def test_not_a_description(text):
    with pytest.raises(StreamError):
        parse_description(text)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"fields": [{}]},
        {"fields": [{"size": "x"}]},
        {"fields": [{"size": -1}]},
        {"fields": 3},
        {"subsections": [{}]},
        {"subsections": ["x"]},
    ],
)
def test_device_makes_no_sense(nonsense):
    with pytest.raises(StreamError, match="makes no sense"):
        described_bytes(nonsense)


def test_too_deep():
    nested: dict = {}
    for _ in range(100):
        nested = {"vmsd_name": "x", "subsections": [nested]}
    with pytest.raises(StreamError, match="too deep"):
        described_bytes(nested)


@pytest.mark.parametrize("entry", [{}, 3, {"name": "x"}, {"name": "x", "instance_id": "y"}])
def test_device_without_identity(entry):
    with pytest.raises(StreamError):
        parse_description(json.dumps({"devices": [entry]}))


def test_the_capabilities_of_the_configuration_are_described():
    begin = Configuration("none", capabilities=("mapped-ram",))
    described = parse_description(build_description(begin, ()))["configuration"]
    size = described_bytes(described)
    assert size == len(encode_configuration(begin)) - 1  # the type byte
