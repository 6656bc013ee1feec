"""``UFFDIO_COPY`` of one page after the other, with as little around the call as there can be.

A thread waits for every one of these calls.  :meth:`postcopy.kernel.userfaultfd.Userfaultfd.copy` does
the same for a run of any length, and takes half as long again for a single page.
"""

import errno
import fcntl
import struct

from postcopy.abi import userfaultfd as abi
from postcopy.errors import KernelError
from postcopy.kernel.patience import Patience
from postcopy.kernel.userfaultfd import Userfaultfd

_ARGUMENT = struct.Struct("<QQQQq")
"""``struct uffdio_copy``: destination, source, length, mode, and the kernel's answer."""


class PageCopier:
    """Places single pages through one userfaultfd; for one thread.

    :param page_size_bytes: of every page that is placed.
    """

    def __init__(self, userfaultfd: Userfaultfd, page_size_bytes: int) -> None:
        self._userfaultfd = userfaultfd
        self._size = page_size_bytes
        # So short that fcntl.ioctl() lets go of the interpreter lock.
        self._argument = bytearray(_ARGUMENT.size)

    def place(self, address: int, source: int) -> bool:
        """Place the page at ``address``, and wake the threads that wait for it.

        :param source: an address in this process.
        :return: whether it was placed; ``False``: there is a page already.
        :raises KernelError: ``EFAULT`` if the source cannot be read; what passes is outlived.
        """
        _ARGUMENT.pack_into(self._argument, 0, address, source, self._size, 0, 0)
        waits: Patience | None = None
        while True:
            try:
                fcntl.ioctl(self._userfaultfd.fd, abi.UFFDIO_COPY.number, self._argument, True)  # noqa: FBT003
            except OSError as error:
                if error.errno == errno.EEXIST:
                    return False
                waits = waits or self._userfaultfd.patience()
                if not waits.outlives(error.errno or 0):
                    name = abi.UFFDIO_COPY.name
                    raise KernelError(name, error.errno or 0, f"at {address:#x}") from error
            else:
                return True
