"""Make a kernel call, and turn its failure into a :class:`~postcopy.errors.KernelError`.

Every call here lets go of the interpreter lock.  That is not a matter of speed: a call may touch
guest memory, and if the page is missing, whoever is to bring it must be able to run meanwhile.
:func:`fcntl.ioctl` does not do: CPython 3.11 keeps the lock for arguments over 1024 bytes.
"""

import ctypes
import errno
import os
from typing import Any

from postcopy.abi.ioctl import Argument, Ioctl, PlainIoctl
from postcopy.errors import KernelError

_libc = ctypes.CDLL(None, use_errno=True)


def _declare(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(_libc, name)
    function.restype, function.argtypes = result, arguments
    return function


# ctypes takes more arguments than are declared, which is what C's "..." needs.
_ioctl = _declare("ioctl", ctypes.c_int, ctypes.c_int, ctypes.c_ulong)
_syscall = _declare("syscall", ctypes.c_long, ctypes.c_long)
_mmap = _declare(
    "mmap",
    ctypes.c_void_p,
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_munmap = _declare("munmap", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_madvise = _declare("madvise", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mincore = _declare("mincore", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_fallocate = _declare(
    "fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long
)
_vm_arguments = (
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong),
    ctypes.c_ulong,
)
_process_vm_readv = _declare("process_vm_readv", ctypes.c_ssize_t, *_vm_arguments)
_process_vm_writev = _declare("process_vm_writev", ctypes.c_ssize_t, *_vm_arguments)
_MAP_FAILED = ctypes.c_void_p(-1).value
_byref = ctypes.byref


def ioctl(fd: int, request: Ioctl[Argument], argument: Argument) -> int:
    """Make a request; what the kernel answers is left in ``argument``, also when it fails.

    :return: the call's result, which is 0 for most requests.
    :raises KernelError: named by the request.
    """
    while True:
        result: int = _ioctl(fd, request.number, _byref(argument))
        if result >= 0:
            return result
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise KernelError(request.name, error)


def ioctl_plain(fd: int, request: PlainIoctl, value: int = 0, *, retry: bool = True) -> int:
    """Make a request that takes a number, or nothing at all.

    :param retry: try again when a signal interrupts; ``KVM_RUN`` must not, since the signal is how
        a vCPU is stopped.
    :return: the call's result, such as a new descriptor.
    :raises KernelError: named by the request; with ``EINTR`` only if not ``retry``.
    """
    while True:
        result: int = _ioctl(fd, request.number, ctypes.c_ulong(value))
        if result >= 0:
            return result
        error = ctypes.get_errno()
        if error != errno.EINTR or not retry:
            raise KernelError(request.name, error)


def syscall(name: str, number: int, *arguments: int) -> int:
    """Make a system call that has no wrapper, with up to six numbers.

    :raises KernelError: named ``name``.
    """
    result: int = _syscall(number, *map(ctypes.c_long, arguments))
    return _checked(name, result)


def mmap(length_bytes: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """Map memory wherever the kernel likes, and return its address."""
    address: int | None = _mmap(None, length_bytes, protection, flags, fd, offset)
    if address is None or address == _MAP_FAILED:
        raise KernelError("mmap", ctypes.get_errno(), f"{length_bytes} bytes of descriptor {fd}")
    return address


def munmap(address: int, length_bytes: int) -> None:
    """Take a mapping away."""
    _checked("munmap", _munmap(address, length_bytes), address, length_bytes)


def madvise(address: int, length_bytes: int, advice: int) -> None:
    """Tell the kernel about a range; interrupted advice is given again."""
    while _madvise(address, length_bytes, advice) < 0:
        error = ctypes.get_errno()
        if error != errno.EINTR:
            where = f"advice {advice} for [{address:#x}, {address + length_bytes:#x})"
            raise KernelError("madvise", error, where)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_memory(address: int, into: int, length_bytes: int) -> None:
    """Copy memory of this process that may be missing, or lost, to memory that is not.

    :raises KernelError: ``EFAULT`` at a page that is poisoned; a plain access would end in ``SIGBUS``.
    """
    _copy_all("process_vm_readv", _process_vm_readv, into, address, length_bytes)


def write_memory(address: int, source: int, length_bytes: int) -> None:
    """Copy to memory of this process that may be missing, or lost; see :func:`read_memory`."""
    _copy_all("process_vm_writev", _process_vm_writev, source, address, length_bytes)


def _copy_all(name: str, call: Any, local: int, remote: int, length_bytes: int) -> None:
    done = 0
    while done < length_bytes:
        here, there = (_Iovec(at + done, length_bytes - done) for at in (local, remote))
        copied = call(os.getpid(), _byref(here), 1, _byref(there), 1, 0)
        done += _checked(name, copied, remote + done, length_bytes - done)


def mincore(address: int, length_bytes: int, result_address: int) -> None:
    """Write one byte a 4 KiB page to ``result_address``; bit 0 says whether it is in memory."""
    _checked("mincore", _mincore(address, length_bytes, result_address), address, length_bytes)


def fallocate(fd: int, mode: int, offset: int, length_bytes: int) -> None:
    """Allocate a range of a file, or punch a hole into it; tried again when interrupted."""
    while _fallocate(fd, mode, offset, length_bytes) < 0:
        error = ctypes.get_errno()
        if error != errno.EINTR:
            where = f"mode {mode} for [{offset:#x}, {offset + length_bytes:#x})"
            raise KernelError("fallocate", error, where)


def _checked(call: str, result: int, address: int | None = None, length_bytes: int = 0) -> int:
    if result < 0:
        where = "" if address is None else f"[{address:#x}, {address + length_bytes:#x})"
        raise KernelError(call, ctypes.get_errno(), where)
    return result
