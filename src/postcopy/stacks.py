"""``kill -USR2 PID``: a process that seems to hang says on its stderr what each of its threads does.

A thread of its own waits for the signal, which is blocked in all others: none is interrupted, and none,
not even the main one, needs to come back from the kernel for it.  That thread looks at the others while
it holds the interpreter lock.  A handler in C that looks without it, as :func:`faulthandler.register`
has one, meets frames that change: it cuts stacks off, and may end the process it was to tell of.

So a process is silent while one of its threads holds that lock and waits: then nothing else of it runs
either, and only a core file tells more.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Final

SIGNAL: Final = signal.SIGUSR2
"""``SIGUSR1`` makes vCPUs leave the guest: see :mod:`postcopy.machine.vcpu`."""

_STDERR: Final = 2


def tell_when_asked() -> None:
    """Be ready for it.  Call it in the main thread, before others start: they inherit what is blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})
    signal.signal(SIGNAL, _Teller())


@contextlib.contextmanager
def not_handed_down() -> Iterator[None]:
    """Start another program in this context: a blocked signal would stay so in it."""
    if not isinstance(signal.getsignal(SIGNAL), _Teller):
        yield  # it is blocked for all programs on purpose
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})


class _Teller:
    """The thread that tells; called, as a handler, where another thread has got the signal."""

    def __init__(self) -> None:
        self._thread = threading.Thread(target=_tell_for_ever, name="stacks", daemon=True)
        with contextlib.suppress(RuntimeError):  # there can be no more threads: it stays silent
            self._thread.start()

    def __call__(self, _number: int, _frame: object) -> None:
        """It was not blocked there: a thread of a library's, or one in :func:`not_handed_down`.

        Python calls handlers in the main thread, when that is not in the kernel; ask twice.
        """
        if self._thread.ident is not None:
            signal.pthread_kill(self._thread.ident, SIGNAL)


def _tell_for_ever() -> None:
    while True:
        signal.sigwait({SIGNAL})
        with contextlib.suppress(Exception):  # whatever it is, the process is to go on
            told = f"Process {os.getpid()}:\n\n{_stacks()}\n"
            if sys.stderr is not None:  # else there was none, and the number is another file's
                os.write(_STDERR, told.encode(errors="backslashreplace"))


def _stacks() -> str:
    """What all threads but this one do, each with its name.

    Written to memory first: to a pipe without a reader it would wait, with the interpreter lock.
    """
    with open(os.memfd_create("stacks"), "w+b") as file:  # noqa: PTH123  it has no path
        faulthandler.dump_traceback(file)
        file.seek(0)
        threads = file.read().decode(errors="replace").strip().split("\n\n")
    told = "\n\n".join(each for each in threads if not each.startswith("Current thread "))
    for thread in threading.enumerate():
        number = f"Thread {thread.ident or 0:#018x}"
        told = told.replace(f"{number} (", f"{number} [{thread.name}] (")
    return told
