"""What Linux's headers say about memory, files in memory, mounts, processes, scheduling and sockets we use.

Nothing here makes a call: that is :mod:`postcopy.kernel`.
"""

import ctypes

HEADER = """
    <sys/mman.h> <linux/mman.h> <linux/memfd.h> <linux/falloc.h> <linux/mount.h> <linux/sched/types.h>
    <linux/futex.h> <linux/prctl.h> <sys/socket.h> <linux/errqueue.h>
"""

PROT_NONE = 0x0
PROT_READ = 0x1
PROT_WRITE = 0x2

MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000

MADV_WILLNEED = 3  # a file: begin to read it
MADV_DONTNEED = 4  # anonymous: the page is gone; shared: only unmapped
MADV_REMOVE = 9  # shared: punch a hole
MADV_POPULATE_WRITE = 23  # 5.14

MFD_CLOEXEC = 0x1
MFD_ALLOW_SEALING = 0x2
MFD_HUGETLB = 0x4
MFD_HUGE_SHIFT = 26

FALLOC_FL_KEEP_SIZE = 0x1
FALLOC_FL_PUNCH_HOLE = 0x2

FSOPEN_CLOEXEC = 0x1
FSMOUNT_CLOEXEC = 0x1
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

FUTEX_WAKE_OP = 5
FUTEX_PRIVATE_FLAG = 128
FUTEX_OP_OR = 2
FUTEX_OP_OPARG_SHIFT = 8  # the argument is 1 << argument
FUTEX_OP_CMP_EQ = 0

PR_SET_PDEATHSIG = 1

SO_ZEROCOPY = 60
MSG_ZEROCOPY = 0x4000000
SO_EE_ORIGIN_ZEROCOPY = 5
SO_EE_CODE_ZEROCOPY_COPIED = 1


class msghdr(ctypes.Structure):
    """``struct msghdr``: what sendmsg(2) sends, and to whom."""

    _fields_ = [
        ("msg_name", ctypes.c_void_p),
        ("msg_namelen", ctypes.c_uint32),
        ("msg_iov", ctypes.c_void_p),
        ("msg_iovlen", ctypes.c_size_t),
        ("msg_control", ctypes.c_void_p),
        ("msg_controllen", ctypes.c_size_t),
        ("msg_flags", ctypes.c_int),
    ]


class sched_attr(ctypes.Structure):
    """``struct sched_attr``

    For an ordinary thread ``sched_runtime`` is, since Linux 6.12, the slice that it asks for, in
    nanoseconds: a thread with a short slice gets a CPU sooner.
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
