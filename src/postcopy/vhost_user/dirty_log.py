"""The dirty log of vhost-user: one bit for each 4 KiB of guest-physical addresses, shared by processes.

The front end takes bits out with an atomic exchange, and several back ends may have the same log (QEMU
shares one among its devices), so a bit must be set by one atomic OR: with a load and a store a bit of
another back end would get lost in between.  Python has no such operation on shared memory, but the
kernel has: ``FUTEX_WAKE_OP`` sets a bit atomically, and is a full barrier beside.
"""

import os
from typing import Final

from postcopy.errors import KernelError, VhostUserError
from postcopy.kernel import futex
from postcopy.kernel.mapping import Mapping

PAGE_SHIFT: Final = 12
_WORD_BITS: Final = 32
_ALL: Final = b"\xff\xff\xff\xff"


class DirtyLog:
    """One log, mapped.

    :param size: in bytes.
    :param offset: where it begins in its file, a multiple of 4096.
    :param fd: the caller's, and not needed afterwards.
    :raises VhostUserError: it leaves its file, or the file cannot be mapped.
    """

    def __init__(self, size: int, offset: int, fd: int) -> None:
        found = os.fstat(fd).st_size
        if not size or size % 4 or offset % 4096 or offset + size > found:
            raise VhostUserError(
                f"a log of {size:#x} bytes from {offset:#x} on, in a file of {found:#x} bytes"
            )
        try:
            self._mapping = Mapping.shared(fd, size, offset)
        except KernelError as error:
            raise VhostUserError(f"its file cannot be mapped: {error}") from error
        self._pages = size * 8
        self._words = self._mapping.buffer()

    def check_covers(self, end_address: int) -> None:
        """Refuse guest memory that goes beyond the log.

        :raises VhostUserError: it does.
        """
        if end_address > self._pages << PAGE_SHIFT:
            raise VhostUserError(
                f"the dirty log covers guest addresses up to {self._pages << PAGE_SHIFT:#x}, and memory "
                f"ends at {end_address:#x}"
            )

    def mark(self, address: int, length: int) -> None:
        """Set the bits of a range that has been written.

        :raises VhostUserError: it goes beyond the log.
        """
        if length <= 0:
            return
        self.check_covers(address + length)
        page, last = address >> PAGE_SHIFT, (address + length - 1) >> PAGE_SHIFT
        while page <= last:
            if not page % _WORD_BITS and last - page >= _WORD_BITS - 1:
                # A word of ones: nothing that another sets at the same time is lost by a plain store.
                at = page // 8
                self._words[at : at + 4] = _ALL
                page += _WORD_BITS
            else:
                word, bit = divmod(page, _WORD_BITS)
                futex.set_bit(self._mapping.address + 4 * word, bit)
                page += 1

    def close(self) -> None:
        """Unmap it."""
        self._words = memoryview(b"")
        self._mapping.close()
