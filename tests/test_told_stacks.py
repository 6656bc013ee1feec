"""A process that is asked what its threads do tells it whole, and goes on as if nothing had been."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

from fakes.stacks import catches
from fakes.waiting import holds_within, wait_until
from postcopy.stacks import SIGNAL

DEADLINE_S = 60
TIMES = 200

BUSY = """
import sys, threading
from postcopy.stacks import tell_when_asked

def deeper(depth):
    return depth and deeper(depth - 1) + sum(each for each in steps(depth % 7))

def steps(count):
    for step in range(count):
        yield len([*map(str, range(step))])

def work():
    while True:
        for depth in range(60):
            deeper(depth)

tell_when_asked()
sys.setswitchinterval(0.0001)
for number in range(3):
    threading.Thread(target=work, name=f"busy-{number}").start()
print("all have begun", flush=True)
work()
"""

IN_THE_KERNEL = """
import ctypes, os
from postcopy.stacks import tell_when_asked

tell_when_asked()
reader, _writer = os.pipe()
ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), ctypes.c_size_t(1))
"""

NO_STDERR = """
import os, sys
from postcopy.stacks import tell_when_asked

kept = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
assert kept == 2
tell_when_asked()
os.read(0, 1)
"""

STDERR_GOES = """
import os
from postcopy.stacks import tell_when_asked

os.close(2)
tell_when_asked()
os.read(0, 1)
"""

ONE_NOT_BLOCKED = """
import signal, threading
from postcopy.stacks import SIGNAL, tell_when_asked

def library():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})
    signal.pthread_kill(threading.get_ident(), SIGNAL)

tell_when_asked()
threading.Thread(target=library).start()
while True:
    threading.Event().wait(0.05)
"""

A_COMMAND = """
import signal, sys, threading
from postcopy.channel.address import ExecAddress
from postcopy.channel.exec_command import CommandChannel
from postcopy.stacks import SIGNAL, not_handed_down, tell_when_asked

tell_when_asked()
command = "exec grep -E 'Sig(Blk|Ign)' /proc/self/status > " + sys.argv[1]
CommandChannel(ExecAddress(command)).close()
assert SIGNAL in signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""


@contextlib.contextmanager
def running(script, stderr, *arguments, before=()):
    """A process that does it; it must not have ended by the end of the context."""
    with (
        stderr.open("wb") as file,
        subprocess.Popen(
            [*before, sys.executable, "-c", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
        ) as process,
    ):
        try:
            wait_until(lambda: catches(process.pid) or process.poll() is not None, DEADLINE_S)
            yield process
            assert process.poll() is None, stderr.read_text()
        finally:
            process.kill()


def dumps(stderr):
    """Each answer, as the stacks of its threads."""
    answers = stderr.read_text().split("Process ")[1:]
    return [answer.strip().split("\n\n")[1:] for answer in answers]


def took(process):
    """Whether the signal has been taken by a thread of the process."""
    pending = [
        int(line.split()[1], 16)
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
        if line.startswith(("SigPnd", "ShdPnd"))
    ]
    return not any(mask >> (SIGNAL - 1) & 1 for mask in pending)


def ask_twice(process):
    """When the second signal is taken, the first one has been answered."""
    for _ in range(2):
        process.send_signal(SIGNAL)
        wait_until(lambda: took(process), DEADLINE_S)


def test_each_of_many_dumps_of_busy_threads_is_whole(tmp_path):
    stderr = tmp_path / "stderr"
    with running(BUSY, stderr) as process:
        process.stdout.readline()
        for count in range(1, TIMES + 1):
            process.send_signal(SIGNAL)
            answered = holds_within(DEADLINE_S, lambda: len(dumps(stderr)) == count)  # noqa: B023
            assert answered, (count, process.poll(), stderr.read_text()[-4000:])
    for threads in dumps(stderr):
        names = sorted(re.findall(r"^Thread .+ \[(.+)\]", "\n".join(threads), re.MULTILINE))
        assert names == ["MainThread", "busy-0", "busy-1", "busy-2"]
        for stack in threads:
            assert re.match(r"Thread 0x[0-9a-f]{16} \[.+\] \(most recent call first\):\n", stack)
            assert stack.endswith((" in _bootstrap", " in <module>")), stack


def test_a_call_of_the_main_thread_to_the_kernel_is_not_interrupted(tmp_path):
    stderr = tmp_path / "stderr"
    with running(IN_THE_KERNEL, stderr) as process:
        process.send_signal(SIGNAL)
        process.send_signal(SIGNAL)
        wait_until(lambda: dumps(stderr), DEADLINE_S)
        asked = len(dumps(stderr))
        wait_until(lambda: took(process), DEADLINE_S)
        process.send_signal(SIGNAL)
        wait_until(lambda: len(dumps(stderr)) > asked, DEADLINE_S)
    assert "[MainThread]" in stderr.read_text()


def test_a_file_that_has_the_number_of_a_closed_stderr_is_left_alone(tmp_path):
    stderr, other = tmp_path / "stderr", tmp_path / "other"
    without = ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh"]
    with running(NO_STDERR, stderr, str(other), before=without) as process:
        ask_twice(process)
    assert not other.read_bytes()


def test_a_process_that_has_closed_its_stderr_goes_on(tmp_path):
    with running(STDERR_GOES, tmp_path / "stderr") as process:
        ask_twice(process)


def test_a_thread_of_a_librarys_may_get_the_signal(tmp_path):
    """Then it is answered as soon as the main thread runs any Python."""
    stderr = tmp_path / "stderr"
    with running(ONE_NOT_BLOCKED, stderr):
        wait_until(lambda: dumps(stderr), DEADLINE_S)


def test_a_command_of_the_users_gets_the_signal_as_ever(tmp_path):
    told = tmp_path / "told"
    subprocess.run([sys.executable, "-c", A_COMMAND, str(told)], check=True, timeout=DEADLINE_S)
    masks = [int(line.split()[1], 16) for line in told.read_text().splitlines()]
    assert len(masks) == 2
    assert not any(mask >> (SIGNAL - 1) & 1 for mask in masks)
