"""Memory that has a descriptor, so that two processes can map it."""

import errno
import fcntl
import os
from collections.abc import Iterator

from postcopy.abi import linux
from postcopy.errors import KernelError
from postcopy.kernel import calls, huge_pages, huge_tmpfs, patience

_SMALL_PAGE_BYTES = 4096


def create(name: str, size_bytes: int, *, huge_page_size: int | None = None) -> int:
    """Make a memfd whose pages are all holes, and return its descriptor (not inherited by exec).

    :param name: shown in ``/proc/PID/maps``.
    :param huge_page_size: bytes, such as ``2 << 20``: take pages of this size from the host's pool,
        and reserve them now.
    :raises HostCannot: there are not enough huge pages; the cure says how many to ask for.
    :raises KernelError: otherwise.
    """
    flags = linux.MFD_CLOEXEC
    if huge_page_size is not None:
        flags |= linux.MFD_HUGETLB | (huge_page_size.bit_length() - 1) << linux.MFD_HUGE_SHIFT
    fd = calls.of_python("memfd_create", f"for {name}", os.memfd_create, name, flags)
    try:
        calls.of_python("ftruncate", f"{size_bytes} bytes", os.ftruncate, fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd if huge_page_size is None else reserved(fd, size_bytes, huge_page_size)


def create_sealed(name: str, size_bytes: int) -> int:
    """As :func:`create`, of a size that no process can change: a mapping of it never ends in ``SIGBUS``."""
    flags = linux.MFD_CLOEXEC | linux.MFD_ALLOW_SEALING
    fd = calls.of_python("memfd_create", f"for {name}", os.memfd_create, name, flags)
    try:
        calls.of_python("ftruncate", f"{size_bytes} bytes", os.ftruncate, fd, size_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        calls.of_python("fcntl(F_ADD_SEALS)", name, fcntl.fcntl, fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def create_transparent(name: str, size_bytes: int) -> int:
    """As :func:`create`, of 2 MiB pages wherever the kernel has one free and this process may use it.

    A guest on those takes far fewer faults.  Without the right to them (``CAP_SYS_ADMIN``) this is a
    plain memfd.
    """
    try:
        return huge_tmpfs.create(size_bytes)
    except KernelError:
        return create(name, size_bytes)


def reserved(fd: int, size_bytes: int, page_size_bytes: int) -> int:
    """Reserve all huge pages of a file now; of small pages nothing is reserved.

    Without that a shortage would be a SIGBUS later, while a guest runs.

    :param fd: is closed if that fails.
    :return: ``fd``.
    :raises HostCannot: there are not enough; the cure adds what is missing.
    """
    if page_size_bytes <= _SMALL_PAGE_BYTES:
        return fd
    try:
        protection, passes = linux.PROT_READ | linux.PROT_WRITE, patience.SIGNALS
        # The reservation is the file's, and outlives the mapping.
        address = calls.mmap(size_bytes, protection, linux.MAP_SHARED, fd, passes=passes)
        calls.munmap(address, size_bytes)
    except KernelError as error:
        os.close(fd)
        if error.errno != errno.ENOMEM:
            raise
        pages = -(-size_bytes // page_size_bytes)
        raise huge_pages.lacking(pages, page_size_bytes) from error
    return fd


def punch_hole(fd: int, offset: int, length_bytes: int) -> None:
    """Take pages back: they are missing again in each mapping.

    :raises KernelError: ``EINVAL`` if the range is empty, ``EPERM`` if the memfd is sealed.
    """
    mode = linux.FALLOC_FL_PUNCH_HOLE | linux.FALLOC_FL_KEEP_SIZE
    calls.fallocate(fd, mode, offset, length_bytes)


def empty(fd: int, offset: int, length_bytes: int) -> None:
    """As :func:`punch_hole`, but does nothing if the file has no pages yet.

    Even where there is no page to take back KVM looks for each through its own tables: 2 ms of 8 GiB.
    """
    if os.fstat(fd).st_blocks:
        punch_hole(fd, offset, length_bytes)


def data_ranges(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Find the parts of ``[start, end)`` that have memory (or swap) behind them; holes are zeros.

    :return: byte ranges ``(first, end)``, ascending, in units of the descriptor's pages.
    """
    at = start
    while at < end:
        try:
            first = calls.of_python("lseek(SEEK_DATA)", "", os.lseek, fd, at, os.SEEK_DATA)
            if first >= end:
                return
            at = calls.of_python("lseek(SEEK_HOLE)", "", os.lseek, fd, first, os.SEEK_HOLE)
        except KernelError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole up to the end of the file, or cut off meanwhile
            raise
        yield first, min(at, end)
