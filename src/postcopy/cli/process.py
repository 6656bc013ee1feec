"""What a process of ours needs before it does anything: UTF-8, standard streams, an answer to Ctrl-C."""

import os
import signal
import sys
from typing import Final

_INPUT, _OUTPUT, _ERRORS = range(3)
_INTERRUPTED: Final = b"postcopy: interrupted\n"


def use_utf8() -> None:
    """Begin again with names of files in UTF-8, whatever the locale; return where they are already.

    QMP, HMP and streams carry names in UTF-8.  A process in another locale opens a file of other bytes
    than its peer means, or none.  What is printed remains in the locale's encoding.
    """
    if sys.getfilesystemencoding() == "utf-8":
        return
    import locale
    from pathlib import Path

    os.environ.setdefault("PYTHONIOENCODING", locale.getencoding())
    _, *rest = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
    os.execv(  # noqa: S606 - there is nothing for a shell to do
        sys.executable, [os.fsencode(sys.executable), b"-X", b"utf8", *rest]
    )


def leave_when_interrupted() -> None:
    """Until :func:`raise_when_interrupted`, Ctrl-C ends the process with a line, and no traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_when_interrupted() -> None:
    """From now on Ctrl-C is a ``KeyboardInterrupt``."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def have_standard_streams() -> None:
    """Open those that are closed, and make none of them fail for the bytes that go through it.

    A file opened later, such as a guest's memory, would get the number of a closed one, and what is
    printed would be written into it.
    """
    if not _is_open(_INPUT):
        _open_null(_INPUT, os.O_RDONLY)
        sys.stdin = os.fdopen(_INPUT, closefd=False)
    if not _is_open(_OUTPUT):
        _open_null(_OUTPUT, os.O_WRONLY)
        sys.stdout = os.fdopen(_OUTPUT, "w", closefd=False)
    if not _is_open(_ERRORS):
        _open_null(_ERRORS, os.O_WRONLY)
        sys.stderr = os.fdopen(_ERRORS, "w", closefd=False)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def flush_output() -> str | None:
    """Write what has been printed; return why that cannot be, and forget it then."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _open_null(_OUTPUT, os.O_WRONLY)  # the interpreter would complain once more, at its end
        return error.strerror or str(error)
    return None


def _leave(_number: int, _frame: object) -> None:
    os.write(_ERRORS, _INTERRUPTED)
    os._exit(1)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _open_null(fd: int, flags: int) -> None:
    null = os.open(os.devnull, flags)
    if null != fd:
        os.dup2(null, fd)
        os.close(null)
    else:
        os.set_inheritable(fd, True)
