"""Lines on standard error that must neither hold up a process nor end it."""

import contextlib
import os
import select
import sys
from typing import Final

_STDERR: Final = 2


def notice(text: str, *, within_s: float = 1.0) -> None:
    """Print one line, unless standard error is closed, or takes nothing within the time.

    :param text: without ``postcopy:``, which is put before it.
    """
    line = f"postcopy: {' '.join(text.split())}\n".encode(sys.stderr.encoding, "backslashreplace")
    poll = select.poll()
    poll.register(_STDERR, select.POLLOUT)
    # A pipe that is ready has room for a page, which is more than one of our lines needs.
    if poll.poll(within_s * 1000):
        with contextlib.suppress(OSError):
            os.write(_STDERR, line)
