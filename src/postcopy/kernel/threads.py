"""Threads: how one is started, although the kernel may have no room for it, and how soon it gets a CPU."""

import ctypes
import errno
import threading
from collections.abc import Callable
from typing import Final

from postcopy.abi.linux import sched_attr
from postcopy.errors import HostCannot, KernelError
from postcopy.kernel import calls
from postcopy.kernel.patience import Patience

_REFUSED: Final = "can't start new thread"
"""Python's words for each failure of pthread_create(3); it does not tell the errno, which is ``EAGAIN``."""


def start(thread: threading.Thread, unless: Callable[[], bool] = lambda: False) -> threading.Thread:
    """Start a thread, and return it; tried again for a while when the kernel has no room for one.

    :param unless: asked when there is no room: whether the thread is not needed any more.
    :raises HostCannot: there was no room for so long; the thread can be started later.
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
    """As :func:`start`, for a thread that is not indispensable; return whether it has been started."""
    try:
        start(thread)
    except HostCannot:
        return False
    return True


_SETATTR, _GETATTR = 314, 315  # x86-64
_SHORTEST_SLICE_NS = 100_000


def run_soon() -> None:
    """Ask the scheduler for a short slice for this thread, so that it gets a CPU as soon as it is woken.

    For threads that have little to do and for which a vCPU waits.  It needs no privilege, and before
    Linux 6.12 it has no effect.
    """
    attributes = sched_attr()
    size = ctypes.sizeof(attributes)
    try:
        calls.syscall("sched_getattr", _GETATTR, 0, ctypes.addressof(attributes), size, 0)
        attributes.sched_runtime = _SHORTEST_SLICE_NS
        calls.syscall("sched_setattr", _SETATTR, 0, ctypes.addressof(attributes), 0)
    except KernelError:
        pass  # the thread keeps the ordinary slice


def slice_ns() -> int:
    """The slice of this thread in nanoseconds; 0 where the kernel does not report it."""
    attributes = sched_attr()
    size = ctypes.sizeof(attributes)
    calls.syscall("sched_getattr", _GETATTR, 0, ctypes.addressof(attributes), size, 0)
    return int(attributes.sched_runtime)
