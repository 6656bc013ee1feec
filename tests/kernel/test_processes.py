"""A forked process is seen to end, can be killed, and does not outlive its parent."""

import os
import signal
import sys

from fakes.waiting import wait_until
from postcopy.kernel.processes import Child


def test_the_exit_code_says_how_its_work_ended(capfd):
    assert Child(lambda: None).wait() == 0
    assert Child(lambda: sys.exit(7)).wait() == 1
    assert "SystemExit: 7" in capfd.readouterr().err
    assert Child(lambda: os.kill(os.getpid(), signal.SIGKILL)).wait() == -signal.SIGKILL


def test_one_that_does_not_end_is_killed_with_its_context():
    with Child(signal.pause) as child:
        assert os.path.exists(f"/proc/{child.pid}")  # noqa: PTH110 - no path is meant
        child.send_signal(signal.SIGCHLD)
    assert not os.path.exists(f"/proc/{child.pid}")  # noqa: PTH110 - no path is meant


def test_it_ends_with_the_process_that_forked_it():
    told, tell = os.pipe()

    def fork_and_end():
        grandchild = Child(signal.pause)
        os.write(tell, str(grandchild.pid).encode())

    assert Child(fork_and_end).wait() == 0
    grandchild = int(os.read(told, 16))

    def has_ended():
        # One that no process waits for any more may stay as a zombie.
        try:
            with open(f"/proc/{grandchild}/stat") as status:  # noqa: PTH123
                return status.read().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_until(has_ended, 10, "the end of the grandchild")
    os.close(told)
    os.close(tell)
