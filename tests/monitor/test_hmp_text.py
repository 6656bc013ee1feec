"""HMP's numbers, and layouts that need a migration to be seen."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.monitor_backend import make_backend
from postcopy.errors import Refused
from postcopy.monitor.hmp import Hmp
from postcopy.monitor.hmp_expression import Expression
from postcopy.monitor.hmp_info import size
from postcopy.monitor.hmp_values import parse_value
from postcopy.monitor.json_stream import JsonError, JsonStream
from postcopy.parameters import rules
from postcopy.sizes import OutOfRange, parse_size
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


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (155989, "152 KiB"),
        (67174400, "64.1 MiB"),
        (2**64 - 1, "16 EiB"),
    ],
)
def test_sizes_have_three_digits_and_a_unit(n_bytes, shown):
    assert size(n_bytes) == shown


def lines_of(info):
    backend = make_backend()
    backend.migration.now = info
    return Hmp(backend, interactive=False).run("info migrate").splitlines()


def test_what_qemu_does_not_measure_comes_after_what_it_does():
    ram = RamStatistics(dirty_pages_rate=12, postcopy_requests=7, downtime_bytes=5)
    info = MigrationInfo(
        Status.COMPLETED, ram=ram, total_time_ms=308, downtime_ms=302, setup_time_ms=0,
        measured=Measured(guest_downtime_us=31),
    )  # fmt: skip
    lines = lines_of(info)
    assert lines[:2] == ["Status: \t\tcompleted", "Time (ms): \t\ttotal=308, setup=0, down=302"]
    assert lines[-4:] == [
        "  Page Rates (pps): \ttransfer=0, dirty=12",
        "  Others: \t\tdirty_syncs=0, postcopy_req=7, downtime_bytes=5",
        "x-postcopy:",
        "  guest-downtime-us: 31",
    ]


def test_a_restore_tells_of_its_memory_although_no_source_sends_it():
    info = MigrationInfo(
        Status.COMPLETED, incoming=True, ram=RamStatistics(total=1 << 20), total_time_ms=5,
        measured=Measured(demand_faults=3),
        socket_address=({"type": "inet", "host": "::1", "port": "4444"},),
    )  # fmt: skip
    lines = lines_of(info)
    assert lines[1:5] == ["Time (ms): \t\ttotal=5", "Sockets: [", "\ttcp:[::1]:4444", "]"]
    assert "  Sizes: \t\tpagesize=4 KiB, total=1 MiB" in lines
    assert lines[-2:] == ["x-postcopy:", "  demand-faults: 3"]
