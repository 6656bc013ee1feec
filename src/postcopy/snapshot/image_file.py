"""The file of an image, mapped read-only."""

import os
import stat
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from postcopy.errors import ImageError
from postcopy.kernel.mapping import Mapping


class ImageFile:
    """All bytes of a file where the kernel has them; costs the same whatever the file's size.

    Whoever cuts the file off while it is mapped ends this process with SIGBUS: that is why images
    are published by a rename and never changed.

    :raises ImageError: there is no such file, it may not be read, or it is no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = open_regular(path)
        try:
            self.size_bytes = _size(path, fd)
            self._mapping = Mapping.shared(fd, self.size_bytes, writable=False)
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd
        self.data: npt.NDArray[np.uint8] = self._mapping.view()
        self.data.flags.writeable = False

    def close(self) -> None:
        """Unmap, now or when the last view is gone.  Harmless when closed."""
        if self.fd >= 0:
            self.data = np.empty(0, np.uint8)
            self._mapping.close()
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _size(path: Path, fd: int) -> int:
    size = os.fstat(fd).st_size
    if not size:
        raise ImageError(path, "the file is empty", 0)
    return size


def open_regular(path: Path) -> int:
    """Open a file for reading, but nothing that could keep us waiting (a FIFO, a device).

    :raises ImageError: there is no such file, it may not be read, or it is no file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as failure:
        raise ImageError(path, f"cannot be opened: {failure.strerror}") from failure
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(path, "not a regular file")
    return fd
