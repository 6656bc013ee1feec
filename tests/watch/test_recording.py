"""A recorded run comes back as it was; a file that is cut or hostile is refused by name and offset."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.commands import one_line, postcopy
from fakes.watching import HEADER, record, samples
from postcopy.errors import ImageError, Refused
from postcopy.watch.recording import Recorder, read
from postcopy.watch.sample import Sample


@pytest.fixture
def run(tmp_path):
    return record(tmp_path / "run", samples())


def test_it_comes_back_as_it_was(run):
    found = read(run)
    assert found.header == HEADER
    assert found.samples == samples()
    assert found.cut_at is None


def test_a_recorder_that_was_killed_loses_one_line_at_most(run):
    """Cut at each byte of the last two lines, and at steps before."""
    whole = run.read_bytes()
    lines = whole.splitlines(keepends=True)
    last = len(whole) - len(lines[-1]) - len(lines[-2])
    for length in (*range(0, last, 997), *range(last, len(whole))):
        run.write_bytes(whole[:length])
        complete = whole[:length].count(b"\n")
        if not complete:
            with pytest.raises(ImageError):
                read(run)
            continue
        found = read(run)
        assert found.samples == samples()[: complete - 1]
        is_whole = whole[length - 1 : length] == b"\n"
        assert found.cut_at == (None if is_whole else whole[:length].rindex(b"\n") + 1)


def hostile(**changes):
    return json.dumps(samples()[3].to_json() | changes).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{\n", "a line is no JSON"),
        (b"\xff\n", "a line is no JSON"),
        (b"[" * 100_000 + b"\n", "a line has more than 500 brackets"),
        (b"[]\n", "a sample is an object"),
        (b'{"t_ms": 1}\n', "a sample has no 'phase'"),
        (hostile(memory="AAAA"), "a sample has no member 'memory'"),
        (hostile(fraction=1.5), "'fraction' of a sample"),
        (hostile(fraction=float("nan")), "'fraction' of a sample"),
        (hostile(t_ms=-1), "'t_ms' of a sample"),
        (hostile(t_ms=True), "'t_ms' of a sample"),
        (hostile(remaining_bytes=1 << 64), "'remaining_bytes' of a sample"),
        (hostile(latency=[0] * 1000), "'latency' of a sample"),
        (hostile(blocktime_us=["0"]), "'blocktime_us' of a sample"),
        (hostile(blocktime_causes_us={"sloth": [1]}), "'blocktime_causes_us' of a sample"),
        (hostile(blocktime_causes_us={"page": [-1]}), "'blocktime_causes_us' of a sample"),
        (hostile(source="\x1b[2J"), "'source' of a sample"),
        (hostile(notes=["a" * 5000]), "'notes' of a sample"),
        (hostile(map={"side": "source", "cells": "q", "pages": {}}), "'map' of a sample"),
        (hostile(map={"side": "source", "cells": "s" * 9999, "pages": {}}), "'map' of a sample"),
        (hostile(map={"side": "source", "cells": "s", "pages": {"x": 1}}), "'map' of a sample"),
        (hostile(map={"side": [], "cells": "s", "pages": {}}), "'map' of a sample"),
        (hostile(t_ms=0), "'t_ms' of a sample is before"),
        (b" " * (1 << 20), "a line is longer than 1048576 bytes"),
    ],
)
def test_a_hostile_line_is_refused_by_name_and_offset(tmp_path, line, what):
    path = record(tmp_path / "run", samples(2 + 18)[1:3])
    offset = path.stat().st_size
    path.write_bytes(path.read_bytes() + line + b"more\n")
    with pytest.raises(ImageError) as caught:
        read(path)
    assert what in str(caught.value)
    assert f"(at byte {offset:#x})" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "the file is empty"),
        (b'{"format": "postcopy-watch"', "it ends within its first line"),
        (b'{"format": "other"}\n', "it is no recorded run"),
        (b'{"format": "postcopy-watch", "version": 2}\n', "it is of version 2 of the format"),
        (b'{"format": "postcopy-watch", "version": 1}\n', "'began' of the header"),
    ],
)
def test_another_file_is_refused(tmp_path, text, what):
    path = tmp_path / "run"
    path.write_bytes(text)
    with pytest.raises(ImageError, match=what):
        read(path)


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_never_breaks_the_reader(tmp_path_factory, place, bit):
    path = record(tmp_path_factory.getbasetemp() / "flipped", samples(20)[:3])
    whole = bytearray(path.read_bytes())
    whole[place % len(whole)] ^= 1 << bit
    path.write_bytes(whole)
    try:
        found = read(path)
    except ImageError:
        return
    assert all(isinstance(each, Sample) for each in found.samples)


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(Refused, match="give a file that can be written"):
        Recorder(tmp_path / "no" / "run", HEADER)


def test_the_command_plays_it_and_says_that_it_is_cut(run):
    whole = run.read_bytes()
    run.write_bytes(whole[:-9])
    outcome = postcopy("watch", str(run))
    assert outcome.returncode == 0, outcome.stderr
    assert "the last line is cut (at byte" in one_line(outcome)
    assert "12 MiB/s" in outcome.stdout
    assert "completed" in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "give a FILE, or --from or --to"),
        (["x", "--from", "unix:y"], "give a FILE, or --from or --to"),
        (["x", "--record", "y"], "--record needs --from or --to"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(arguments, what):
    outcome = postcopy("watch", *arguments)
    assert outcome.returncode == 2
    assert what in outcome.stderr


def test_a_report_of_a_run_without_a_sample_is_refused(tmp_path):
    path = record(tmp_path / "run", [])
    outcome = postcopy("report", str(path), "-o", str(tmp_path / "page.html"))
    assert outcome.returncode == 3
    assert "has no sample" in one_line(outcome)
