"""HMP's numbers, and layouts that need a migration to be seen."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import Refused
from postcopy.monitor.hmp_expression import Expression
from postcopy.monitor.hmp_info import migrate, ranges
from postcopy.monitor.hmp_values import OutOfRange, parse_size, parse_value
from postcopy.monitor.json_stream import JsonError, JsonStream
from postcopy.parameters import rules
from postcopy.statistics import Measured, MigrationInfo, RamStatistics
from postcopy.status import Status

UNITS = {"": 0, "b": 0, "k": 10, "M": 20, "g": 30, "T": 40, "P": 50, "e": 60}


@given(st.integers(0, 2**64 - 1), st.sampled_from(sorted(UNITS)))
def test_sizes(number, unit):
    expected = number << UNITS[unit]
    if expected < 2**64:
        assert parse_size(f"{number}{unit}") == expected
    else:
        with pytest.raises(OutOfRange):
            parse_size(f"{number}{unit}")


@given(st.integers(0, 1000), st.integers(0, 999))
def test_fractions(whole, thousandths):
    expected = (whole * 1000 + thousandths) * 1024 // 1000
    assert parse_size(f"{whole}.{thousandths:03d}k") == expected


@given(st.sampled_from(sorted(rules())), st.text(max_size=12))
def test_any_text_is_a_value_or_refused(name, text):
    with contextlib.suppress(Refused):
        parse_value(name, rules()[name], text)


@given(st.text(alphabet="0123456789abx+-*/%&|^~()' $", max_size=20))
def test_any_expression_is_a_number_or_refused(text):
    with contextlib.suppress(Refused):
        assert 0 <= Expression(text).value < 2**64


@given(st.lists(st.binary(max_size=20)))
def test_any_bytes_are_messages_or_errors(chunks):
    whole, cut = JsonStream(), JsonStream()
    together = [str(m) for m in whole.feed(b"".join(chunks))]
    apart = [str(m) for chunk in chunks for m in cut.feed(chunk)]
    assert together == apart


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=4), st.integers(1, 7), st.booleans())
def test_json_cut_anywhere(values, cut, ascii_only):
    usable = [v for v in values if "\\u0000" not in (t := json.dumps(v)) and "\\ufff" not in t
              and "\\ud8" not in t.replace("\\\\", "")]  # fmt: skip
    text = "\n".join(json.dumps(v, ensure_ascii=ascii_only) for v in usable) + "\n"
    data = text.encode()
    stream, found = JsonStream(), []
    for start in range(0, len(data), cut):
        found += stream.feed(data[start : start + cut])
    assert found == usable


def test_too_deep_is_refused_once():
    answers = list(JsonStream().feed(b"[" * 5000))
    assert all(isinstance(a, JsonError) and "nesting depth" in str(a) for a in answers)


def test_ranges_as_qemu_prints_them():
    assert ranges([1449, 0]) == "0,1449"
    assert ranges([0, 0]) == "0"
    assert ranges([3, 1, 2, 7, 8]) == "1-3,7-8"


def test_info_migrate_of_a_source():
    ram = RamStatistics(transferred=148579, total=64 << 20, mbps=3.859194805194805,
                        duplicate=16384, dirty_sync_count=2, precopy_bytes=147468,
                        postcopy_requests=7)  # fmt: skip
    info = MigrationInfo(
        Status.COMPLETED, ram=ram, total_time_ms=308, downtime_ms=302, setup_time_ms=0,
        measured=Measured(guest_downtime_us=31),
    )  # fmt: skip
    assert list(migrate(info.to_qapi()))[7:] == [
        "Migration status: completed",
        "total time: 308 ms",
        "downtime: 302 ms",
        "setup: 0 ms",
        "transferred ram: 145 kbytes",
        "throughput: 3.86 mbps",
        "remaining ram: 0 kbytes",
        "total ram: 65536 kbytes",
        "duplicate: 16384 pages",
        "normal: 0 pages",
        "normal bytes: 0 kbytes",
        "dirty sync count: 2",
        "page size: 4 kbytes",
        "multifd bytes: 0 kbytes",
        "pages-per-second: 0",
        "postcopy request count: 7",
        "precopy ram: 144 kbytes",
        "x-postcopy guest-downtime-us: 31",
    ]


def test_info_migrate_of_a_destination():
    info = MigrationInfo(
        Status.COMPLETED, incoming=True, postcopy_blocktime_ms=5,
        postcopy_vcpu_blocktime_ms=(5, 9), postcopy_latency_ns=120, postcopy_latency_dist=(0,) * 24,
        socket_address=({"type": "inet", "host": "::1", "port": "4444"},),
    )  # fmt: skip
    lines = list(migrate(info.to_qapi()))
    assert lines[7:11] == [
        "Migration status: completed",
        "total time: 0 ms",
        "postcopy blocktime: 5",
        "postcopy vcpu blocktime: 5,9",
    ]
    assert "  [ 1 us - 2 us ]: 0" in lines
    assert "  [ 8 sec - 16 sec ]: 0" in lines
    assert lines[-3:] == ["socket address: [", "\ttcp:[::1]:4444", "]"]
