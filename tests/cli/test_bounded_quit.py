"""``quit`` and SIGTERM end a guest's process, whatever it waits for."""

import contextlib
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from cli.test_run import children
from fakes.commands import DEADLINE_S, POSTCOPY, Running
from fakes.stopping import stop_process
from fakes.waiting import wait_until

pytestmark = pytest.mark.kvm

ENDS_S = 15
"""Before an engine that hangs is noticed."""


@pytest.fixture
def stop():
    """``stop(pid)``: it does nothing any more, and is ended after the test."""
    stopped = []

    def stop_it(pid):
        stop_process(pid)
        stopped.append(pid)

    yield stop_it
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("end", ["quit", "SIGTERM"])
def test_while_an_order_waits_for_an_engine(tmp_path, stop, end):
    with Running(tmp_path, "target", "--incoming", "defer") as target:
        for engine in children(target.process.pid):
            stop(int(engine.name))
        ordering = threading.Thread(target=order_in_vain, args=(target,), daemon=True)
        ordering.start()
        wait_until(lambda: last_order(target) == "migrate-incoming", DEADLINE_S, "the order")
        if end == "quit":
            assert target.ask("quit") == {"return": {}}
        else:
            target.process.terminate()
        assert target.process.wait(ENDS_S) == 0
        assert not target.path.exists()
        ordering.join(DEADLINE_S)


def order_in_vain(target):
    with contextlib.suppress(OSError, ValueError):  # no answer comes
        target.ask("migrate-incoming", uri="tcp:127.0.0.1:0")


def last_order(target):
    return target.ask("query-status")["return"].get("x-last-order", {}).get("name")


def test_while_the_process_starts(stop):
    line = [*POSTCOPY, "run", "--memory", "64M", "--incoming", "defer"]
    process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: children(process.pid), DEADLINE_S, "an engine")
        for engine in children(process.pid):
            stop(int(engine.name))
        wait_until(lambda: catches(process.pid, signal.SIGTERM), DEADLINE_S, "it takes signals")
        process.terminate()
        _, told = process.communicate(timeout=ENDS_S)
        assert process.returncode == 0
        assert told == "postcopy: terminating on signal 15\n"
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def catches(process_id, number):
    """Whether the process has a handler for a signal."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1
