"""Starting threads, for which the kernel may have no room."""

import errno
import threading
from collections.abc import Callable
from typing import Final

from postcopy.errors import HostCannot
from postcopy.kernel.patience import Patience

_REFUSED: Final = "can't start new thread"
"""Python's words for each failure of pthread_create(3); it does not tell the errno, which is ``EAGAIN``."""


def start(thread: threading.Thread, unless: Callable[[], bool] = lambda: False) -> threading.Thread:
    """Start a thread, and return it; that the kernel has no room for one is outlived while it may pass.

    :param unless: asked when there is no room: whether another does its work, and it need not start.
    :raises HostCannot: it has lasted; the thread can be started later.
    """
    waits: Patience | None = None
    while True:
        try:
            thread.start()
        except RuntimeError as error:
            if str(error) != _REFUSED:
                raise
            waits = waits or Patience()
            if unless():
                return thread
            if not waits.outlives(errno.EAGAIN):
                what = f"the thread '{thread.name}' cannot be started"
                cure = "raise the limit of threads ('ulimit -u', 'pids.max'), or free some memory"
                raise HostCannot(what, cure) from error
        else:
            return thread


def start_if_possible(thread: threading.Thread) -> bool:
    """As :func:`start`, of a thread that others can do without; return whether it has been started."""
    try:
        start(thread)
    except HostCannot:
        return False
    return True
