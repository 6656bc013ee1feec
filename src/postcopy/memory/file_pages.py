"""Which huge pages a file of hugetlbfs has; the others are holes, and zero.

``lseek(2)`` takes all of such a file for data, and ``mincore(2)`` knows only what this process has mapped.
A hole that is read is allocated, and the kernel clears 2 MiB for it.  So the file is mapped a second time,
where it is never touched, and a userfaultfd maps there what the file has: at a hole it refuses to.
"""

import errno
from typing import Final

from postcopy.abi.userfaultfd import Feature, RegisterMode
from postcopy.errors import KernelError, PageExists
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.memory.runs import Mask, runs

_MINCORE_BYTES: Final = 4096


class FilePages:
    """The pages of one file, from any number of threads.

    :param offset_bytes: of the first page in the file.
    :raises HostCannot: there is no userfaultfd for this process, or the kernel is older than 5.13.
    :raises KernelError: the file cannot be mapped, or is not hugetlbfs's.
    """

    def __init__(
        self, fd: int, size_bytes: int, page_size_bytes: int, offset_bytes: int = 0
    ) -> None:
        self._page_bytes = page_size_bytes
        # No thread faults there, so any user may have this one.
        self._userfaultfd = Userfaultfd.open(Feature.MINOR_HUGETLBFS, user_mode_only=True)
        try:
            self._mapping = Mapping.shared(fd, size_bytes, offset_bytes, writable=False)
        except KernelError:
            self._userfaultfd.close()
            raise
        try:
            self._userfaultfd.register(self._mapping.address, size_bytes, RegisterMode.MINOR)
        except KernelError:
            self.close()
            raise

    def found(self, start: int, end: int) -> Mask:
        """Tell which pages ``start`` to ``end`` (not included) the file has.

        :raises KernelError: the kernel does not say.
        """
        size = self._page_bytes
        resident = self._mapping.resident(start * size, (end - start) * size)
        found: Mask = resident[:: size // _MINCORE_BYTES].copy()
        for first, stop in runs(~found).tolist():
            self._map(found, start, first, stop)
        return found

    def close(self) -> None:
        """Unmap the file and close the userfaultfd."""
        self._userfaultfd.close()
        self._mapping.close()

    def _map(self, found: Mask, start: int, first: int, stop: int) -> None:
        """Map what there is from page ``start + first`` to ``start + stop``, and note it."""
        size, at = self._page_bytes, first
        while at < stop:
            address = self._mapping.address + (start + at) * size
            try:
                count = self._userfaultfd.map_existing(address, (stop - at) * size) // size
            except PageExists:  # another thread looks, too
                count = 1
            except KernelError as error:
                if error.errno != errno.EFAULT:
                    raise
                at += 1
                continue
            found[at : at + count] = True
            at += count
