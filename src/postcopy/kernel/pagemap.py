"""The page tables of a process: which pages were written (``PAGEMAP_SCAN``), and unmapping many ranges.

With a userfaultfd of the feature ``WP_ASYNC`` registered for write-protection, this is dirty
tracking from outside: no thread waits for a handler, and the scan reports and protects in one step, so
no write is lost between the two.  Writes through *another* mapping (``pwrite`` on the memfd, the
engine's own mapping) are not seen.
"""

import ctypes
import errno
import os
from typing import Self

import numpy as np
import numpy.typing as npt

from postcopy.abi import linux
from postcopy.abi.pagemap import PAGEMAP_SCAN, PageCategory, ScanFlag, pm_scan_arg
from postcopy.errors import KernelError
from postcopy.kernel import calls
from postcopy.kernel.calls import ioctl
from postcopy.kernel.patience import NONE, Patience

_PAGE_BYTES, _ENTRY_BYTES = 4096, 8  # of the file, see Documentation/admin-guide/mm/pagemap.rst
_CURES = {
    errno.ENOTTY: "this kernel has no PAGEMAP_SCAN; use Linux 6.7 or newer",
    errno.EPERM: "the range is not registered with a userfaultfd of the feature WP_ASYNC",
    errno.ESRCH: "the process is gone",
}
_OPEN_CURES = {
    errno.EACCES: "needs the process's own user or CAP_SYS_PTRACE",
    errno.ENOENT: "there is no such process",
}


class PagemapScanner:
    """Asks about the pages of one process.  Not for two threads at once: it has one buffer.

    :param pid: the process, 0 for this one.
    :param capacity: ranges that one kernel call can report; more take more calls.
    :raises KernelError: the process is gone or not ours.
    """

    def __init__(self, pid: int, *, capacity: int = 1 << 16) -> None:
        path = f"/proc/{pid or 'self'}/pagemap"
        try:
            fd = calls.of_python("open", path, os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        except KernelError as error:
            cure = _OPEN_CURES.get(error.errno)
            raise KernelError("open", error.errno, f"{path}; {cure}" if cure else path) from error
        self._fd = fd
        self._regions = np.empty((capacity, 3), np.uint64)  # start, end, categories

    def scan(
        self,
        start: int,
        end: int,
        *,
        protect: bool,
        categories: PageCategory = PageCategory.WRITTEN,
    ) -> npt.NDArray[np.uint64]:
        """Find the pages that are all of ``categories``.

        :param start: an address in the scanned process, as is ``end``; multiples of the page size.
        :param protect: write-protect what is found, so that the next scan finds only what was
            written since.  The range must be registered for ``WP_ASYNC``.
        :return: shape ``(n, 2)``: ``[start, end)`` addresses, ascending, never touching each other.
            Where a call failed and was made again, pages that were not written are among them: the
            kernel does not report what the failed call had protected.
        :raises KernelError: ``ENOTTY``, ``EPERM`` or ``ESRCH``, each with its cure.
        """
        flags = ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC if protect else 0
        argument = pm_scan_arg(
            size=ctypes.sizeof(pm_scan_arg),
            flags=flags,
            end=end,
            vec=self._regions.ctypes.data,
            vec_len=len(self._regions),
            category_mask=categories,
            return_mask=categories,
        )
        found: list[npt.NDArray[np.uint64]] = []
        at = start
        while at < end:
            argument.start = at
            count, has_failed = self._ask(argument)
            if argument.walk_end <= at:
                raise KernelError("PAGEMAP_SCAN", errno.EIO, f"stands still at {at:#x}")
            if protect and has_failed:
                _append(found, np.array([[at, argument.walk_end]], np.uint64))
            elif count:
                _append(found, self._regions[:count, :2].copy())
            at = argument.walk_end
        if not found and start < end:
            self._check_alive(start)
        return np.concatenate(found) if found else np.empty((0, 2), np.uint64)

    def mapped(self, address: int, pages: int, page_size_bytes: int) -> npt.NDArray[np.bool_]:
        """Tell which of the pages from an address on the process has mapped."""
        found = np.zeros(pages, np.bool_)
        end = address + pages * page_size_bytes
        for first, last in self.scan(
            address, end, protect=False, categories=PageCategory.PRESENT
        ).tolist():
            start, stop = first - address, last - address
            found[start // page_size_bytes : stop // page_size_bytes] = True
        return found

    def _check_alive(self, address: int) -> None:
        """Some kernels find nothing in the memory of a process that is gone; all read it as ended.

        :raises KernelError: it is gone.
        """
        where = address // _PAGE_BYTES * _ENTRY_BYTES
        if not calls.of_python("pread", "pagemap", os.pread, self._fd, _ENTRY_BYTES, where):
            raise KernelError("PAGEMAP_SCAN", errno.ESRCH, _CURES[errno.ESRCH])

    def _ask(self, argument: pm_scan_arg) -> tuple[int, bool]:
        """Return how many ranges were found, and whether it has failed before."""
        waits: Patience | None = None
        while True:
            try:
                return ioctl(self._fd, PAGEMAP_SCAN, argument, passes=NONE), waits is not None
            except KernelError as error:
                waits = waits or Patience()
                if not waits.outlives(error.errno):
                    where = f"[{argument.start:#x}, {argument.end:#x})"
                    cure = _CURES.get(error.errno)
                    detail = f"{where}; {cure}" if cure else where
                    raise KernelError(error.call, error.errno, detail) from error
                argument.walk_end = 0

    def fileno(self) -> int:
        """The pagemap's descriptor."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor.  Harmless when closed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _append(found: list[npt.NDArray[np.uint64]], more: npt.NDArray[np.uint64]) -> None:
    # A full buffer can cut a range in two: mend it, so that callers see whole runs.
    if found and found[-1][-1, 1] == more[0, 0]:
        more[0, 0] = found[-1][-1, 0]
        found[-1] = found[-1][:-1]
        if not len(found[-1]):
            found.pop()
    found.append(more)


_PROCESS_MADVISE = 440  # x86-64 and everywhere else
_MOST_TOGETHER = 1024  # UIO_MAXIOV


def unmap(ranges: npt.NDArray[np.uint64]) -> None:
    """Unmap ranges of shared memory; what they hold stays in the file (``MADV_DONTNEED``).

    :param ranges: shape ``(n, 2)``: address and length in bytes, of whole pages.
    """
    vectors = np.ascontiguousarray(ranges, np.uint64)
    process = calls.of_python("pidfd_open", "", os.pidfd_open, os.getpid())
    try:
        for first in range(0, len(vectors), _MOST_TOGETHER):
            _unmap_some(process, vectors[first : first + _MOST_TOGETHER])
    finally:
        os.close(process)


def _unmap_some(process: int, vectors: npt.NDArray[np.uint64]) -> None:
    # In one call from Linux 6.13 on, a third of the time that single calls take.
    wanted = int(vectors[:, 1].sum())
    try:
        done = calls.syscall(
            "process_madvise",
            _PROCESS_MADVISE,
            process,
            vectors.ctypes.data,
            len(vectors),
            linux.MADV_DONTNEED,
            0,
        )
    except KernelError as error:
        if error.errno not in {errno.EINVAL, errno.EPERM, errno.ENOSYS}:
            raise
        done = 0
    if done != wanted:
        for address, length_bytes in vectors.tolist():
            calls.madvise(address, length_bytes, linux.MADV_DONTNEED)
