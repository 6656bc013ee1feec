"""Sending bytes from the many places where they lie: ``writev`` by address.

:func:`os.writev` wants a Python object for each piece, which for pages and their headers costs as much
as to copy them together.  Here the kernel reads its array of pieces as numpy has written it.
"""

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Any

# Not when it runs: a guest that wakes has channels, and does not wait until numpy has been imported.
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

IOV_MAX = 1024
"""Pieces the kernel takes in one gathering call, see sysconf(_SC_IOV_MAX)."""

_LOST = "a page of guest memory cannot be read: it is lost (poisoned)"

_libc = ctypes.CDLL(None, use_errno=True)


def _declare(name: str, *arguments: Any) -> Any:
    function = getattr(_libc, name)
    function.restype, function.argtypes = ctypes.c_ssize_t, arguments
    return function


_writev = _declare("writev", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_pwritev = _declare("pwritev", ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long)


class Gathering:
    """What is left of pieces of memory that go out one after the other.

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
        return self._passed(_call(_writev, fd, self._left.ctypes.data, self._count))

    def write_at(self, fd: int, position: int) -> int:
        """As :meth:`write`, from a byte of the file on."""
        return self._passed(_call(_pwritev, fd, self._left.ctypes.data, self._count, position))

    @property
    def _count(self) -> int:
        return min(len(self._left), IOV_MAX)

    def _passed(self, n_bytes: int) -> int:
        """Leave out what is gone now."""
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


def _call(function: Any, fd: int, *arguments: int) -> int:
    while True:
        result: int = function(fd, *arguments)
        if result >= 0:
            return result
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, _LOST if error == errno.EFAULT else os.strerror(error))
