"""100 000 mutated streams, files and lines: each is read, or refused by name and offset."""

import os
import subprocess
import sys

import pytest

from fuzzing.readers import Reader
from house.project import ROOT
from postcopy.errors import StreamError

COUNT = 100_000
DEADLINE_S = 300


@pytest.mark.timeout(DEADLINE_S + 20)
def test_whatever_comes_is_read_or_refused():
    """In a process with little memory, which a case that takes too long ends."""
    outcome = subprocess.run(
        [sys.executable, "-m", "fuzzing", "--seed", "1", "--mutations", str(COUNT)],
        cwd=ROOT / "tests",
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    lines = [line.split() for line in outcome.stdout.splitlines()]
    assert sum(int(count) for _, count, *_ in lines) >= COUNT
    for name, count, taken, *_ in lines:
        assert int(taken) > 0, f"{name}: nothing was taken, so nothing behind the start was tried"
        assert int(taken) < int(count) or name in {"hmp", "json"}, f"{name}: nothing was refused"


def reader(read):
    return Reader.of_bytes("test", [bytes(range(100))], read)


def test_a_case_is_always_the_same():
    whole = reader(lambda _: None)
    assert [whole.case(5, number) for number in range(50)] == [
        whole.case(5, number) for number in range(50)
    ]
    assert len({whole.case(5, number) for number in range(50)}) > 40
    assert whole.case(5, 1) != whole.case(6, 1)


def raises(error):
    def read(_):
        raise error

    return reader(read)


def test_only_a_documented_error_with_a_place_is_a_refusal():
    assert not raises(StreamError("wrong", 3)).run(bytes(9))
    for error in (StreamError("wrong"), StreamError("wrong", 10)):
        with pytest.raises(AssertionError):
            raises(error).run(bytes(9))
    for error in (IndexError(), MemoryError(), ValueError("x")):
        with pytest.raises(type(error)):
            raises(error).run(bytes(9))
