"""The file of an image, and damaged parts of it.

The file is read by system calls, and mapped only for the kernel to copy from.  A process that touches a
mapped page gets SIGBUS if the disk cannot read it, or if the file has been truncated before it.  A system
call fails instead, and the error can be reported.  So no code of this process touches the mapping; the
kernel may get addresses in it (``UFFDIO_COPY``), and answers ``EFAULT``.
"""

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, ParamSpec, Self, TypeVar

import numpy as np
import numpy.typing as npt

from postcopy.errors import ImageError, KernelError, PostcopyError
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.patience import PASSES, persist

_PIECE_BYTES = 1 << 30  # the kernel reads no more than 2 GiB in one call

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_DAMAGES: Final = frozenset(
    {errno.EIO, errno.EREMOTEIO, errno.EBADMSG, errno.EUCLEAN, errno.EILSEQ, errno.ENODATA}
)
"""Errors of a read where the disk, or the file system, has lost the bytes."""

WRONG_DIGEST: Final = "do not agree with their digest"


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes of a file that do not agree with their digest, or cannot be read.

    :ivar offset, length_bytes: where in the file.
    :ivar block, block_offset: the RAM block, and the offset in it, to which they belong; ``None`` for
        bytes that are no memory: the list of blocks, the bitmaps, the devices.
    :ivar reason: what is wrong with them, as a predicate.
    """

    path: Path
    offset: int
    length_bytes: int
    block: str | None = None
    block_offset: int | None = None
    reason: str = WRONG_DIGEST

    def error(self) -> ImageError:
        """Make the error that reports it."""
        if self.block is None or self.block_offset is None:
            what = "no memory of the guest, but what describes it"
        else:
            what = f"block {self.block} from offset {self.block_offset:#x} on"
        return ImageError(
            self.path,
            f"{self.length_bytes} bytes {self.reason}: {what}",
            self.offset,
        )


class ImageFile:
    """A file that is read at any place, by any thread.

    :param fd: a descriptor of it, which is closed with it; the path is for messages then.
    :ivar size_bytes: its length when it was opened.
    :raises ImageError: there is no such file, it may not be read, or it is no regular file.
    """

    def __init__(self, path: Path, fd: int | None = None) -> None:
        self.path = path
        self._mapping: Mapping | None = None
        self.fd = open_regular(path) if fd is None else fd
        self.size_bytes = os.fstat(self.fd).st_size
        if not self.size_bytes:
            self.close()
            raise ImageError(path, "the file is empty", 0)

    def read(self, start: int, count: int) -> npt.NDArray[np.uint8]:
        """Read bytes; fewer than ``count`` where the file ended when it was opened.

        :raises ImageError: the disk cannot read them, or the file has been truncated since.
        :raises KernelError: they cannot be read now; the file may be intact.
        """
        count = max(0, min(count, self.size_bytes - start))
        if not count:
            return np.empty(0, np.uint8)  # the kernel would refuse some offsets
        if count <= _PIECE_BYTES:
            try:
                raw = _twice(os.pread, self.fd, count, start)
            except OSError as failure:
                raise self._failed("pread", failure, start) from failure
            if len(raw) == count:
                return np.frombuffer(raw, np.uint8)
        data = np.empty(count, np.uint8)
        self.read_into(start, data)
        return data

    def read_into(self, start: int, into: npt.NDArray[np.uint8]) -> None:
        """Fill a contiguous array of any shape with the bytes from ``start`` on.

        :raises ImageError: the disk cannot read them, or the file has been truncated since.
        :raises KernelError: they cannot be read now; the file may be intact.
        """
        left = into.data.cast("B")
        while len(left):
            try:
                count = _twice(os.preadv, self.fd, [left[:_PIECE_BYTES]], start)
            except OSError as failure:
                raise self._failed("preadv", failure, start) from failure
            if not count:
                raise self._unreadable(
                    f"the file is cut off after {self.current_bytes} bytes", start
                )
            left, start = left[count:], start + count

    @property
    def current_bytes(self) -> int:
        """Its length now: less than :attr:`size_bytes` if the file has been truncated since."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    @property
    def address(self) -> int:
        """The address at which the file is mapped in this process, for the kernel to copy from.

        :raises KernelError: it cannot be mapped.
        """
        if self._mapping is None:
            self._mapping = Mapping.shared(self.fd, self.size_bytes, writable=False)
        return self._mapping.address

    def close(self) -> None:
        """Close and unmap.  Harmless when closed."""
        fd, self.fd = self.fd, -1
        if self._mapping is not None:
            self._mapping.close()
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _failed(self, call: str, failure: OSError, start: int) -> PostcopyError:
        """Distinguish a disk that cannot read the bytes from a host that cannot read now."""
        if failure.errno in _DAMAGES:
            return self._unreadable(failure.strerror, start)
        return KernelError(call, failure.errno or 0, f"of {self.path} (at byte {start:#x})")

    def _unreadable(self, why: str | None, start: int) -> ImageError:
        return ImageError(self.path, f"cannot be read: {why}", start)


def _twice(
    call: Callable[Parameters, Result], *arguments: Parameters.args, **named: Parameters.kwargs
) -> Result:
    """Read, and read once more after an error of the disk: pages of a guest may be declared lost for it."""
    try:
        return persist(call, *arguments, **named)
    except OSError as failure:
        if failure.errno not in _DAMAGES:
            raise
        return persist(call, *arguments, **named)


def open_regular(path: Path) -> int:
    """Open a regular file for reading; a FIFO or a device, which could block, is refused.

    :raises ImageError: there is no such file, it may not be read, or it is no file.
    :raises KernelError: no file can be opened now.
    """
    try:
        fd = persist(os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as failure:
        if failure.errno in PASSES | {errno.EMFILE, errno.ENFILE}:
            raise KernelError("open", failure.errno or 0, str(path)) from failure
        raise ImageError(path, f"cannot be opened: {failure.strerror}") from failure
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(path, "not a regular file")
    return fd
