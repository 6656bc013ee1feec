"""Processes: forked by this one, and killed with it; where another one has a file mapped."""

import contextlib
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, NoReturn, Self

from postcopy.abi import linux
from postcopy.kernel import calls

_PRCTL: Final = {"x86_64": 157, "aarch64": 167, "riscv64": 167}


class Child:
    """A forked process, by a descriptor that becomes readable when it has ended.

    :param work: what it does; its end is the end of the process, with exit code 0, or 1 if it raised.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        parent = os.getpid()
        self.pid = calls.of_python("fork", "", os.fork)
        if not self.pid:
            _run(work, parent)
        self._pidfd = calls.of_python("pidfd_open", "", os.pidfd_open, self.pid)

    def fileno(self) -> int:
        """For ``poll``."""
        return self._pidfd

    def send_signal(self, number: int) -> None:
        """Send it a signal; harmless if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def wait(self) -> int:
        """Wait for its end and let go of it; return its exit code, or minus the signal that ended it."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        self._pidfd = -1
        return os.waitstatus_to_exitcode(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pidfd >= 0:
            self.send_signal(signal.SIGKILL)  # which also ends a wait for a page of memory
            self.wait()


def _run(work: Callable[[], None], parent: int) -> NoReturn:
    code = 1
    try:
        end_with_parent(parent)
        work()
        code = 0
    except BaseException:  # no caller of this process's parent must see it
        traceback.print_exc()
    finally:
        os._exit(code)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that forked it ends.

    :param parent: the process that has forked this one; it may have ended before the call.
    """
    calls.syscall("prctl", _PRCTL[os.uname().machine], linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class MappedPart(NamedTuple):
    """A part of a file that a process has mapped.

    :ivar address: where it begins in the process.
    :ivar offset: where it begins in the file.
    """

    address: int
    offset: int
    length_bytes: int


def mapped_parts(process_id: int, fd: int) -> list[MappedPart]:
    """Where a process has a file of ours mapped, in order of its addresses (``/proc/PID/maps``).

    :param fd: of the file, which is found by its device and inode: a memfd's name proves nothing.
    :raises KernelError: the process has ended, or is not ours to look at.
    """
    file = os.fstat(fd)
    path = Path(f"/proc/{process_id}/maps")
    text = calls.of_python("open", f"{path}", path.read_text, errors="replace")
    found = []
    for line in text.splitlines():
        addresses, _, offset, device, inode, *_ = line.split(maxsplit=5)
        major, minor = (int(number, 16) for number in device.split(":"))
        if int(inode) == file.st_ino and os.makedev(major, minor) == file.st_dev:
            first, end = (int(address, 16) for address in addresses.split("-"))
            found.append(MappedPart(first, int(offset, 16), end - first))
    return found
