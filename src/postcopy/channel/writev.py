"""``writev(2)`` from many pieces of memory, given by address.

:func:`os.writev` takes a Python object for each piece, which for pages and their headers costs as much as
to copy them together.  Here the kernel reads the array of pieces as numpy has written it.
"""

from typing import TYPE_CHECKING

from postcopy.kernel.calls import read_pieces, send_pieces, write_pieces

# Only for types: numpy takes long to import, and a restored guest does not run before that.
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

IOV_MAX = 1024
"""Pieces the kernel takes in one gathering call, see sysconf(_SC_IOV_MAX)."""


class PendingPieces:
    """Pieces of memory that are written one after the other, and of which some are left.

    :param pieces: address and length in bytes of each (``struct iovec``), shape ``(n, 2)``, contiguous.
    """

    def __init__(self, pieces: "npt.NDArray[np.uint64]") -> None:
        self._left = pieces
        self._ends = pieces[:, 1].cumsum()  # bytes up to the end of each
        self._gone_bytes = 0

    def __bool__(self) -> bool:
        return len(self._left) > 0

    def write(self, fd: int) -> int:
        """Write one byte or more, in one call that lets go of the interpreter lock; return how many.

        :raises OSError: as :func:`os.writev`.
        """
        return self.passed(write_pieces(fd, self._left.ctypes.data, self._count))

    def send(self, fd: int, flags: int) -> int:
        """As :meth:`write`, over a socket and with flags of sendmsg(2)."""
        return self.passed(send_pieces(fd, self._left.ctypes.data, self._count, flags))

    def read(self, fd: int) -> int:
        """Fill one byte or more from a socket, in one call; return how many, 0 = it has ended.

        :raises OSError: as :func:`os.readv`.
        """
        return self.passed(read_pieces(fd, self._left.ctypes.data, self._count))

    def write_at(self, fd: int, position: int) -> int:
        """As :meth:`write`, from a byte of the file on."""
        return self.passed(write_pieces(fd, self._left.ctypes.data, self._count, position))

    @property
    def _count(self) -> int:
        return min(len(self._left), IOV_MAX)

    def passed(self, n_bytes: int) -> int:
        """Leave so many bytes out, which are done; return their number."""
        self._gone_bytes += n_bytes
        whole = self._count
        if self._gone_bytes != int(self._ends[whole - 1]):
            whole = int((self._ends <= self._gone_bytes).sum())
        self._left, self._ends = self._left[whole:], self._ends[whole:]
        if len(self._left):
            rest_bytes = int(self._ends[0]) - self._gone_bytes
            gone_bytes = int(self._left[0, 1]) - rest_bytes
            if gone_bytes:
                self._left = self._left.copy()  # the caller's stay as they are
                self._left[0] = int(self._left[0, 0]) + gone_bytes, rest_bytes
        return n_bytes
