"""A process that stands still, as under a debugger."""

import contextlib
import os
import signal
from pathlib import Path

from fakes.waiting import wait_until


def stop_process(process_id: int) -> None:
    """Stop it, and wait until it does nothing any more.

    The signal alone stops one thread at some time, and that one then stops the others: until all have,
    some may still answer.
    """
    os.kill(process_id, signal.SIGSTOP)
    wait_until(lambda: _all_stopped(process_id), 30.0, "it stands still")


def _all_stopped(process_id: int) -> bool:
    """Whether each thread of a process stands still by a signal, or has ended."""
    states = set()
    with contextlib.suppress(OSError):  # one has just ended
        for task in Path(f"/proc/{process_id}/task").iterdir():
            states.add((task / "stat").read_text(errors="replace").rpartition(")")[2].split()[0])
    return states <= set("TtZX")
