"""A process that cannot tell what its threads do: whoever asks hears why."""

import os
import subprocess
import sys

import pytest

from fakes import stacks
from fakes.stacks import TellsNothing, ask, catches
from fakes.waiting import wait_until
from postcopy.stacks import SIGNAL

HELD_UP = f"""
import signal
signal.signal({int(SIGNAL)}, lambda *_: None)
while True:
    signal.pause()
"""


@pytest.fixture
def held_up(tmp_path):
    """It takes the signal, and tells nothing."""
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-c", HELD_UP], stderr=stderr)
    with process:
        try:
            wait_until(lambda: catches(process.pid), 30, "it listens")
            yield process.pid
        finally:
            process.kill()


def test_one_that_says_nothing(held_up, monkeypatch):
    monkeypatch.setattr(stacks, "_MOST_S", 0.05)
    with pytest.raises(TellsNothing, match=f"process {held_up} said nothing for 0.05 s: one of"):
        ask(held_up)
    assert f"process {held_up} said nothing" in stacks.stacks()


def test_one_whose_stderr_is_no_file():
    with subprocess.Popen([sys.executable, "-c", HELD_UP], stderr=subprocess.PIPE) as process:
        try:
            wait_until(lambda: catches(process.pid), 30, "it listens")
            with pytest.raises(TellsNothing, match="on its stderr, which is no file"):
                ask(process.pid)
        finally:
            process.kill()


def test_one_that_the_signal_would_end():
    with subprocess.Popen([sys.executable, "-c", "import os; os.read(0, 1)"],
                          stdin=subprocess.PIPE) as process:  # fmt: skip
        with pytest.raises(TellsNothing, match="or the signal would end it"):
            ask(process.pid)
        assert process.poll() is None
        process.stdin.close()


def test_one_that_is_not_there():
    with pytest.raises(TellsNothing, match="has ended"):
        ask(os.getpid() + (1 << 22))
