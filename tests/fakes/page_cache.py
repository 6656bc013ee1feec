"""What the kernel keeps of a file in memory: nothing, where it was written or read with ``O_DIRECT``."""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest

from postcopy.kernel.mapping import Mapping

_PAGE_BYTES = 4096
_TMPFS = 0x01021994
_STATFS_BYTES = 256

_libc = ctypes.CDLL(None, use_errno=True)


def need_disk(folder: Path) -> None:
    """Skip the test where a file is in memory anyway."""
    buffer = (ctypes.c_long * (_STATFS_BYTES // ctypes.sizeof(ctypes.c_long)))()
    assert not _libc.statfs(os.fsencode(folder), buffer), os.strerror(ctypes.get_errno())
    if buffer[0] == _TMPFS:
        pytest.skip(f"needs a file on a disk, which {folder} is not: give --basetemp on one")


def cached(path: Path) -> np.ndarray:
    """For each page of a file whether it is in the page cache."""
    size = path.stat().st_size
    resident = np.zeros(-(-size // _PAGE_BYTES), np.uint8)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # the kernel tells only who may write
    mapping = Mapping.shared(fd, size)
    os.close(fd)
    failed = _libc.mincore(
        ctypes.c_void_p(mapping.address),
        ctypes.c_size_t(size),
        ctypes.c_void_p(resident.ctypes.data),
    )
    assert not failed, os.strerror(ctypes.get_errno())
    mapping.close()
    return (resident & 1).astype(bool)
