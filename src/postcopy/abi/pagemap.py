"""What ``<linux/fs.h>`` says about ``PAGEMAP_SCAN``: asking ``/proc/PID/pagemap`` about pages.

Linux 6.7 has it.  Nothing here makes a call: that is :mod:`postcopy.kernel.pagemap`.
"""

import ctypes
import enum

from postcopy.abi.ioctl import iowr

HEADER = "<linux/fs.h>"


class PageCategory(enum.IntFlag, boundary=enum.KEEP):
    """``PAGE_IS_*``: what a page can be."""

    WPALLOWED = 1 << 0  # registered for asynchronous write-protection
    WRITTEN = 1 << 1  # written since it was last protected
    FILE = 1 << 2  # of a file or shared memory
    PRESENT = 1 << 3
    SWAPPED = 1 << 4  # or a hole that is write-protected or poisoned: it is marked the same way
    PFNZERO = 1 << 5  # the kernel's page of zeros: never written
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7


class ScanFlag(enum.IntFlag):
    """``PM_SCAN_*``"""

    WP_MATCHING = 1 << 0  # protect what is reported, in the same step
    CHECK_WPASYNC = 1 << 1  # EPERM unless the range is registered for WP_ASYNC


class page_region(ctypes.Structure):
    """``struct page_region``: a run of pages alike."""

    _fields_ = [
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("categories", ctypes.c_uint64),
    ]


class pm_scan_arg(ctypes.Structure):
    """``struct pm_scan_arg``

    A page matches if it has all of ``category_mask`` and any of ``category_anyof_mask``, after the
    bits of ``category_inverted`` have been turned over.
    """

    _fields_ = [
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("walk_end", ctypes.c_uint64),  # out: where to go on
        ("vec", ctypes.c_uint64),  # address of an array of page_region
        ("vec_len", ctypes.c_uint64),  # in elements
        ("max_pages", ctypes.c_uint64),
        ("category_inverted", ctypes.c_uint64),
        ("category_mask", ctypes.c_uint64),
        ("category_anyof_mask", ctypes.c_uint64),
        ("return_mask", ctypes.c_uint64),
    ]


PAGEMAP_SCAN = iowr("PAGEMAP_SCAN", ord("f"), 16, pm_scan_arg)

C_NAMES = {PageCategory: "PAGE_IS_{}", ScanFlag: "PM_SCAN_{}"}

NEWER = frozenset(
    {
        *("PAGEMAP_SCAN", "pm_scan_arg", "page_region"),
        *(f"PageCategory.{member.name}" for member in PageCategory),
        *(f"ScanFlag.{member.name}" for member in ScanFlag),
    }
)
