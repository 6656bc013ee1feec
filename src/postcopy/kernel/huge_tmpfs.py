"""Memory that the kernel backs with 2 MiB pages where it has them, and with small ones where not.

A memfd gets such *transparent* huge pages only if the administrator has allowed it for the whole host
(``shmem_enabled``).  A tmpfs has a say of its own (``huge=``, see ``Documentation/filesystems/tmpfs.rst``),
so we make one.  It is attached nowhere: no path leads to it, and it is gone with its last open file.

Nothing is reserved, and every page can still be missing, placed, protected and tracked by itself: where
that is asked of a part of a huge page, the kernel maps the page in small pieces.
"""

import ctypes
import os
from typing import Final

from postcopy.abi import linux
from postcopy.errors import KernelError
from postcopy.kernel import calls

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # x86-64
_OPTIONS: Final = {
    "huge": "within_size",  # no huge page reaches beyond the end of the file
    "size": "0",  # no limit; it would be half of the host's memory
}


def create(size_bytes: int) -> int:
    """Make a file in memory that is one hole, and return its descriptor (not inherited by exec).

    :raises KernelError: ``EPERM`` without ``CAP_SYS_ADMIN``; ``EINVAL`` if the kernel has no huge pages
        for tmpfs; ``ENOSYS`` before Linux 5.2.
    """
    mounted = _mount()
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        where = "in a tmpfs of our own"
        fd = calls.of_python("open", where, os.open, ".", flags, 0o600, dir_fd=mounted)
    finally:
        os.close(mounted)
    try:
        calls.of_python("ftruncate", f"{size_bytes} bytes", os.ftruncate, fd, size_bytes)
    except KernelError:
        os.close(fd)
        raise
    return fd


def _mount() -> int:
    with _Text("tmpfs") as name:
        context = calls.syscall("fsopen", _FSOPEN, name, linux.FSOPEN_CLOEXEC)
    try:
        for key, value in _OPTIONS.items():
            with _Text(key) as at, _Text(value) as to:
                command = linux.FSCONFIG_SET_STRING
                calls.syscall("fsconfig", _FSCONFIG, context, command, at, to, 0)
        calls.syscall("fsconfig", _FSCONFIG, context, linux.FSCONFIG_CMD_CREATE, 0, 0, 0)
        return calls.syscall("fsmount", _FSMOUNT, context, linux.FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


class _Text:
    """A string where the kernel can read it, and its address, for the length of a call."""

    def __init__(self, text: str) -> None:
        self._buffer = ctypes.create_string_buffer(text.encode())

    def __enter__(self) -> int:
        return ctypes.addressof(self._buffer)

    def __exit__(self, *_: object) -> None:
        del self._buffer
