"""A guest's process in the foreground of a terminal, its engine in the background of the same session."""

import contextlib
import os
import subprocess
import sys
import termios

import pytest

from cli.test_run import children
from fakes.commands import POSTCOPY, need_kvm
from fakes.pair import DEADLINE_S
from fakes.stacks import catches
from fakes.waiting import wait_until
from postcopy.stacks import SIGNAL

IN_THE_FOREGROUND = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
LOCAL_MODES = 3  # index of the list of termios(3)


@pytest.fixture
def terminal():
    """Both ends of one that stops what writes to it from the background."""
    ours, theirs = os.openpty()
    modes = termios.tcgetattr(theirs)
    modes[LOCAL_MODES] |= termios.TOSTOP
    termios.tcsetattr(theirs, termios.TCSANOW, modes)
    os.set_blocking(ours, False)
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("option", ["--incoming=defer", "--workload=idle"])
def test_a_terminal_neither_stops_nor_interrupts_an_engine(terminal, option):
    """The engine is a branch of the guest's process in one case, and a new interpreter in the other."""
    need_kvm()
    ours, theirs = terminal
    shown = bytearray()

    def shows(what):
        with contextlib.suppress(OSError):  # there is nothing now, or the terminal has been hung up
            shown.extend(os.read(ours, 1 << 16))
        return what in shown

    command = [*POSTCOPY, "run", "--memory", "64M", "--monitor", "none", option]
    guest = subprocess.Popen(
        [sys.executable, "-c", IN_THE_FOREGROUND, *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    try:
        wait_until(lambda: any(catches(int(each.name)) for each in children(guest.pid)), DEADLINE_S)
        (engine,) = (int(each.name) for each in children(guest.pid))
        assert (os.getsid(engine), os.getpgid(engine)) == (guest.pid, engine)
        os.kill(engine, SIGNAL)
        wait_until(lambda: shows(b"engine/engine.py"), DEADLINE_S, "what the engine says")
        os.write(ours, b"\x03")
        wait_until(lambda: shows(b"") and guest.poll() is not None, DEADLINE_S, "the end")
    finally:
        guest.kill()
        guest.wait(DEADLINE_S)
    shows(b"")
    assert b"KeyboardInterrupt" not in shown, shown.decode()
