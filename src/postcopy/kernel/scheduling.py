"""When a thread gets a CPU."""

import ctypes

from postcopy.abi.sched import sched_attr
from postcopy.errors import KernelError
from postcopy.kernel import calls

_SETATTR, _GETATTR = 314, 315  # x86-64
_SHORTEST_SLICE_NS = 100_000


def run_soon() -> None:
    """Ask for short turns of the CPU for this thread, and so to get them as soon as it wakes.

    For threads that have little to do, for which a vCPU waits.  It takes no right, and where the
    kernel does not know of it (before Linux 6.12) nothing changes.
    """
    attributes = sched_attr()
    size = ctypes.sizeof(attributes)
    try:
        calls.syscall("sched_getattr", _GETATTR, 0, ctypes.addressof(attributes), size, 0)
        attributes.sched_runtime = _SHORTEST_SLICE_NS
        calls.syscall("sched_setattr", _SETATTR, 0, ctypes.addressof(attributes), 0)
    except KernelError:
        pass  # it runs as the others do


def slice_ns() -> int:
    """The length of this thread's turns, in nanoseconds; 0 where the kernel does not say."""
    attributes = sched_attr()
    size = ctypes.sizeof(attributes)
    calls.syscall("sched_getattr", _GETATTR, 0, ctypes.addressof(attributes), size, 0)
    return int(attributes.sched_runtime)
