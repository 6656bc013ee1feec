"""What ``<linux/sched/types.h>`` says about a thread's scheduling.

Nothing here makes a call: that is :mod:`postcopy.kernel.scheduling`.
"""

import ctypes

HEADER = "<linux/sched/types.h>"


class sched_attr(ctypes.Structure):
    """``struct sched_attr``

    For an ordinary thread ``sched_runtime`` is, since Linux 6.12, the slice that it asks for, in
    nanoseconds: a thread that wants little at a time is let in sooner.
    """

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("sched_policy", ctypes.c_uint32),
        ("sched_flags", ctypes.c_uint64),
        ("sched_nice", ctypes.c_int32),
        ("sched_priority", ctypes.c_uint32),
        ("sched_runtime", ctypes.c_uint64),
        ("sched_deadline", ctypes.c_uint64),
        ("sched_period", ctypes.c_uint64),
        ("sched_util_min", ctypes.c_uint32),
        ("sched_util_max", ctypes.c_uint32),
    ]
