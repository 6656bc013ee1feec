"""The engine's process ends when it is to end, and not earlier."""

import subprocess
import sys

from fakes.pair import QUICK, engines
from fakes.waiting import wait_until
from faults.fault_channel import SHUT
from faults.recovering import Recovering, broken_journey
from journeys.conftest import journey, nothing_left_behind
from postcopy.link.guest.engine_slot import EnginePool
from postcopy.status import Status

__all__ = ["journey", "nothing_left_behind"]

FAULTY = """
import threading
from postcopy.engine.__main__ import end_on_fault
end_on_fault(lambda fault: print("told:", fault, flush=True))
thread = threading.Thread(target=lambda: 1 // 0, name="pager")
thread.start()
threading.Event().wait()
"""


def test_a_fault_in_any_thread_ends_it_and_is_told():
    ended = subprocess.run(
        [sys.executable, "-c", FAULTY], capture_output=True, text=True, timeout=20, check=False
    )
    assert ended.returncode == 1
    assert "pager" in ended.stderr
    assert "ZeroDivisionError" in ended.stderr
    assert ended.stdout.startswith("told: ")


def test_what_an_engine_says_before_it_dies_is_told():
    pool = EnginePool()
    engine = pool.take()
    try:
        engine.fails("poll failed: Bad file descriptor (EBADF)")
        assert engine.fate == "died (poll failed: Bad file descriptor (EBADF))"
    finally:
        engine.kill()
        engine.end()
        pool.close()


def test_a_destination_stays_until_its_last_word_has_been_read(journey, tmp_path):
    """Gone at once, it would reset the connection, and the last word could be lost with it."""
    trip = broken_journey(journey, parameters=QUICK)
    with Recovering(trip, tmp_path) as moving:
        channel = moving.channel(moving.destination.listen())
        stalled = channel.stall(SHUT, at=0)
        moving.source.control.migrate(channel.uri)
        engine = moving.destination.engine_process_id()
        stalled.wait()
        moving.destination.wait(Status.COMPLETED)
        assert engine in engines()
        channel.flow()
        moving.source.wait(Status.COMPLETED)
        wait_until(lambda: engine not in engines(), 10, "the engine's end")
