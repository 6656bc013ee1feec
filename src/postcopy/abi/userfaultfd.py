"""What ``<linux/userfaultfd.h>`` says, and nothing more.

Structures, fields and requests carry the kernel's own names, so that a search for ``UFFDIO_COPY``
finds the kernel's manual page and this file alike.  Nothing here makes a call: that is
:mod:`postcopy.kernel.userfaultfd`.
"""

import ctypes
import enum

from postcopy.abi.ioctl import io, ior, iowr

HEADER = "<linux/userfaultfd.h>"

UFFD_API = 0xAA
UFFD_USER_MODE_ONLY = 1  # 5.11; a flag of the system call: faults inside system calls get EFAULT


class Feature(enum.IntFlag, boundary=enum.KEEP):
    """``UFFD_FEATURE_*``.  A newer kernel's unknown bits are kept, not refused."""

    PAGEFAULT_FLAG_WP = 1 << 0  # 5.7
    EVENT_FORK = 1 << 1  # 4.11; needs CAP_SYS_PTRACE
    EVENT_REMAP = 1 << 2  # 4.11
    EVENT_REMOVE = 1 << 3  # 4.11
    MISSING_HUGETLBFS = 1 << 4  # 4.11
    MISSING_SHMEM = 1 << 5  # 4.11
    EVENT_UNMAP = 1 << 6  # 4.11
    SIGBUS = 1 << 7  # 4.14; a signal in place of an event
    THREAD_ID = 1 << 8  # 4.14; blocktime needs it to know which vCPU waits
    MINOR_HUGETLBFS = 1 << 9  # 5.13
    MINOR_SHMEM = 1 << 10  # 5.14
    EXACT_ADDRESS = 1 << 11  # 5.18; the address is not rounded down to its page
    WP_HUGETLBFS_SHMEM = 1 << 12  # 5.19
    WP_UNPOPULATED = 1 << 13  # 6.4; without it the first write to an untouched page is not told
    POISON = 1 << 14  # 6.6
    WP_ASYNC = 1 << 15  # 6.7; without a message: PAGEMAP_SCAN finds what was written
    MOVE = 1 << 16  # 6.8


class RegisterMode(enum.IntFlag, boundary=enum.KEEP):
    """``UFFDIO_REGISTER_MODE_*``: which accesses fault."""

    MISSING = 1 << 0  # there is no page
    WP = 1 << 1  # a write to a protected page
    MINOR = 1 << 2  # the file has the page, but this address space has not mapped it


class RangeIoctl(enum.IntFlag, boundary=enum.KEEP):
    """``1 << _UFFDIO_*``: which requests a registered range takes."""

    WAKE = 1 << 2
    COPY = 1 << 3
    ZEROPAGE = 1 << 4
    MOVE = 1 << 5
    WRITEPROTECT = 1 << 6
    CONTINUE = 1 << 7
    POISON = 1 << 8


class EventCode(enum.IntEnum):
    """``UFFD_EVENT_*``: what a message tells."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class PagefaultFlag(enum.IntFlag, boundary=enum.KEEP):
    """``UFFD_PAGEFAULT_FLAG_*``; no flag at all is a read of a missing page."""

    WRITE = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class uffdio_api(ctypes.Structure):
    """``struct uffdio_api``: asked for, then answered with all that this kernel has."""

    _fields_ = [
        ("api", ctypes.c_uint64),
        ("features", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),
    ]


class uffdio_range(ctypes.Structure):
    """``struct uffdio_range``"""

    _fields_ = [("start", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class uffdio_register(ctypes.Structure):
    """``struct uffdio_register``"""

    _fields_ = [
        ("range", uffdio_range),
        ("mode", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),  # out: RangeIoctl
    ]


class uffdio_copy(ctypes.Structure):
    """``struct uffdio_copy``"""

    _fields_ = [
        ("dst", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("copy", ctypes.c_int64),  # out: bytes copied, or -errno
    ]


class uffdio_zeropage(ctypes.Structure):
    """``struct uffdio_zeropage``"""

    _fields_ = [
        ("range", uffdio_range),
        ("mode", ctypes.c_uint64),
        ("zeropage", ctypes.c_int64),  # out: bytes zeroed, or -errno
    ]


class uffdio_writeprotect(ctypes.Structure):
    """``struct uffdio_writeprotect``"""

    _fields_ = [("range", uffdio_range), ("mode", ctypes.c_uint64)]


class uffdio_continue(ctypes.Structure):
    """``struct uffdio_continue``"""

    _fields_ = [
        ("range", uffdio_range),
        ("mode", ctypes.c_uint64),
        ("mapped", ctypes.c_int64),  # out: bytes mapped, or -errno
    ]


class uffdio_poison(ctypes.Structure):
    """``struct uffdio_poison``"""

    _fields_ = [
        ("range", uffdio_range),
        ("mode", ctypes.c_uint64),
        ("updated", ctypes.c_int64),  # out: bytes poisoned, or -errno
    ]


class _pagefault(ctypes.Structure):
    _fields_ = [
        ("flags", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("ptid", ctypes.c_uint32),  # in C: feat.ptid
    ]
    _c_paths_ = {"ptid": "feat.ptid"}


class _fork(ctypes.Structure):
    _fields_ = [("ufd", ctypes.c_uint32)]


class _remap(ctypes.Structure):
    _fields_ = [("from", ctypes.c_uint64), ("to", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class _remove(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint64), ("end", ctypes.c_uint64)]


class _reserved(ctypes.Structure):
    _fields_ = [
        ("reserved1", ctypes.c_uint64),
        ("reserved2", ctypes.c_uint64),
        ("reserved3", ctypes.c_uint64),
    ]


class _argument(ctypes.Union):
    _fields_ = [
        ("pagefault", _pagefault),
        ("fork", _fork),
        ("remap", _remap),
        ("remove", _remove),  # UNMAP too
        ("reserved", _reserved),
    ]


class uffd_msg(ctypes.Structure):
    """``struct uffd_msg``: one event, as read from the descriptor."""

    _pack_ = 1
    _fields_ = [
        ("event", ctypes.c_uint8),
        ("reserved1", ctypes.c_uint8),
        ("reserved2", ctypes.c_uint16),
        ("reserved3", ctypes.c_uint32),
        ("arg", _argument),
    ]


UFFDIO_COPY_MODE_DONTWAKE = 1 << 0
UFFDIO_COPY_MODE_WP = 1 << 1
UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1 << 0
UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0
UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1
UFFDIO_CONTINUE_MODE_DONTWAKE = 1 << 0
UFFDIO_CONTINUE_MODE_WP = 1 << 1
UFFDIO_POISON_MODE_DONTWAKE = 1 << 0

USERFAULTFD_IOC_NEW = io("USERFAULTFD_IOC_NEW", 0xAA, 0x00)  # 6.1; on /dev/userfaultfd
UFFDIO_API = iowr("UFFDIO_API", UFFD_API, 0x3F, uffdio_api)
UFFDIO_REGISTER = iowr("UFFDIO_REGISTER", UFFD_API, 0x00, uffdio_register)
UFFDIO_UNREGISTER = ior("UFFDIO_UNREGISTER", UFFD_API, 0x01, uffdio_range)
UFFDIO_WAKE = ior("UFFDIO_WAKE", UFFD_API, 0x02, uffdio_range)
UFFDIO_COPY = iowr("UFFDIO_COPY", UFFD_API, 0x03, uffdio_copy)
UFFDIO_ZEROPAGE = iowr("UFFDIO_ZEROPAGE", UFFD_API, 0x04, uffdio_zeropage)
UFFDIO_WRITEPROTECT = iowr("UFFDIO_WRITEPROTECT", UFFD_API, 0x06, uffdio_writeprotect)
UFFDIO_CONTINUE = iowr("UFFDIO_CONTINUE", UFFD_API, 0x07, uffdio_continue)
UFFDIO_POISON = iowr("UFFDIO_POISON", UFFD_API, 0x08, uffdio_poison)

C_NAMES = {
    Feature: "UFFD_FEATURE_{}",
    RegisterMode: "UFFDIO_REGISTER_MODE_{}",
    RangeIoctl: "(1ULL << _UFFDIO_{})",
    EventCode: "UFFD_EVENT_{}",
    PagefaultFlag: "UFFD_PAGEFAULT_FLAG_{}",
}

NEWER = frozenset(
    {
        *("Feature.WP_UNPOPULATED", "Feature.POISON", "Feature.WP_ASYNC", "Feature.MOVE"),
        *("RangeIoctl.POISON", "UFFDIO_POISON", "uffdio_poison", "UFFDIO_POISON_MODE_DONTWAKE"),
        *("RangeIoctl.MOVE", "UFFDIO_CONTINUE_MODE_WP"),
    }
)
