"""Set-up of a process: UTF-8, standard streams, Ctrl-C; and notices on standard error."""

import contextlib
import importlib
import os
import select
import signal
import sys
from typing import Final

_INPUT, _OUTPUT, _ERRORS = range(3)
_BLAS_THREADS: Final = "OPENBLAS_NUM_THREADS"
_INTERRUPTED: Final = b"postcopy: interrupted\n"


def use_utf8() -> None:
    """Execute the interpreter again in UTF-8 mode, unless file names are in UTF-8 already.

    QMP, HMP and streams carry names in UTF-8; in another locale the bytes of a file's name would differ.
    Output stays in the locale's encoding.
    """
    if sys.getfilesystemencoding() == "utf-8":
        return
    import locale
    from pathlib import Path

    os.environ.setdefault("PYTHONIOENCODING", locale.getencoding())
    _, *rest = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
    os.execv(  # noqa: S606 - no shell is needed
        sys.executable, [os.fsencode(sys.executable), b"-X", b"utf8", *rest]
    )


def import_numpy() -> None:
    """Import numpy without the threads of its linear algebra, which no command uses.

    They keep all other processors busy for a tenth of a second, while a QEMU starts there.  Processes that
    are started later have the environment as it was.
    """
    kept = os.environ.get(_BLAS_THREADS)
    os.environ.setdefault(_BLAS_THREADS, "1")
    importlib.import_module("numpy")
    if kept is None:
        del os.environ[_BLAS_THREADS]


def exit_when_interrupted() -> None:
    """Until :func:`raise_when_interrupted`, Ctrl-C ends the process with one line and no traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def raise_when_interrupted() -> None:
    """From now on Ctrl-C is a ``KeyboardInterrupt``."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def have_standard_streams() -> None:
    """Open closed standard streams on ``/dev/null``, and let none of them fail for its encoding.

    A file that is opened later, such as a guest's memory, would get the descriptor of a closed stream,
    and output would be written into it.
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
    """Flush standard output; on an error discard its buffer, and return the reason."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _open_null(_OUTPUT, os.O_WRONLY)  # the interpreter would report the error again at its end
        return error.strerror or str(error)
    return None


def notice(text: str, *, within_s: float = 1.0) -> None:
    """Print one line on standard error, unless it is closed, or blocks for the time.

    :param text: ``postcopy:`` is put before it.
    """
    line = f"postcopy: {' '.join(text.split())}\n".encode(sys.stderr.encoding, "backslashreplace")
    poll = select.poll()
    poll.register(_ERRORS, select.POLLOUT)
    # A pipe that is ready takes a page, and a line is shorter.
    if poll.poll(within_s * 1000):
        with contextlib.suppress(OSError):
            os.write(_ERRORS, line)


def _exit(_number: int, _frame: object) -> None:
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
