"""Make a kernel call, and turn its failure into a :class:`~postcopy.errors.KernelError`.

A call that fails for a reason that may pass is made again, see :mod:`postcopy.kernel.patience`.

Every call here lets go of the interpreter lock.  That is not a matter of speed: a call may touch
guest memory, and if the page is missing, the thread that brings it must be able to run meanwhile.
:func:`fcntl.ioctl` does not do: CPython 3.11 keeps the lock for arguments over 1024 bytes.
"""

import ctypes
import errno
import os
import resource
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ParamSpec, TypeVar

from postcopy.abi import linux
from postcopy.abi.ioctl import Argument, Ioctl, PlainIoctl
from postcopy.errors import HostCannot, KernelError
from postcopy.kernel import patience
from postcopy.kernel.patience import PASSES, Patience

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_LOST = "a page of guest memory cannot be read: it is lost (poisoned)"

_libc = ctypes.CDLL(None, use_errno=True)


def _declare(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(_libc, name)
    function.restype, function.argtypes = result, arguments
    return function


# ctypes takes more arguments than are declared, which is what C's "..." needs.
_ioctl = _declare("ioctl", ctypes.c_int, ctypes.c_int, ctypes.c_ulong)
_syscall = _declare("syscall", ctypes.c_long, *[ctypes.c_long] * 7)
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
_memmove = _declare("memmove", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_process_vm_writev = _declare("process_vm_writev", ctypes.c_ssize_t, *_vm_arguments)
_readv = _declare("readv", ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_writev = _declare("writev", ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_pwritev = _declare(
    "pwritev", ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long
)
_sendmsg = _declare("sendmsg", ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_UNUSED = (0,) * 6  # a call takes no notice of more arguments than it has
_MAP_FAILED = ctypes.c_void_p(-1).value
_byref = ctypes.byref


def ioctl(
    fd: int,
    request: Ioctl[Argument],
    argument: Argument,
    *,
    passes: frozenset[int] = PASSES,
) -> int:
    """Make a request; what the kernel answers is left in ``argument``, also when it fails.

    :param passes: the errnos at which the call is made again.
    :return: the call's result, which is 0 for most requests.
    :raises KernelError: named by the request.
    """
    result: int = _ioctl(fd, request.number, _byref(argument))
    if result >= 0:
        return result
    return _outlive(request.name, passes, str, lambda: _ioctl(fd, request.number, _byref(argument)))


def ioctl_plain(fd: int, request: PlainIoctl, value: int = 0, *, retry: bool = True) -> int:
    """Make a request that takes a number, or nothing at all.

    :param retry: try again when a signal interrupts; ``KVM_RUN`` must not, since the signal is how
        a vCPU is stopped.
    :return: the call's result, such as a new descriptor.
    :raises KernelError: named by the request; with ``EINTR`` only if not ``retry``.
    """
    result: int = _ioctl(fd, request.number, ctypes.c_ulong(value))
    if result >= 0:
        return result
    passes = PASSES if retry else PASSES - patience.SIGNALS
    return _outlive(
        request.name, passes, str, lambda: _ioctl(fd, request.number, ctypes.c_ulong(value))
    )


def syscall(name: str, number: int, *arguments: int) -> int:
    """Make a system call that has no wrapper, with up to six numbers.

    :raises KernelError: named ``name``.
    """
    return _made(name, PASSES, str, _syscall, number, *arguments, *_UNUSED[len(arguments) :])


def mmap(
    length_bytes: int,
    protection: int,
    flags: int,
    fd: int = -1,
    offset: int = 0,
    *,
    at: int | None = None,
    passes: frozenset[int] = PASSES,
) -> int:
    """Map memory, and return its address.

    :param at: where, with ``MAP_FIXED``; None: at an address of the kernel's choice.
    :param passes: the errnos at which the call is made again.
    """

    def call() -> int:
        address: int | None = _mmap(at, length_bytes, protection, flags, fd, offset)
        return -1 if address is None or address == _MAP_FAILED else address

    return _made("mmap", passes, lambda: f"{length_bytes} bytes of descriptor {fd}", call)


def munmap(address: int, length_bytes: int) -> None:
    """Unmap a range."""
    where = partial(_range, address, length_bytes)
    _made("munmap", PASSES, where, lambda: _munmap(address, length_bytes))


def madvise(
    address: int, length_bytes: int, advice: int, *, passes: frozenset[int] = PASSES
) -> None:
    """``madvise(2)`` for a range; made again when a signal interrupts it.

    :param passes: the errnos at which the call is made again.
    """

    def where() -> str:
        return f"advice {advice} for {_range(address, length_bytes)}"

    _made("madvise", passes, where, lambda: _madvise(address, length_bytes, advice))


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


def copy_number(to: int, source: int, length_bytes: int) -> None:
    """Copy an aligned number of 2, 4 or 8 bytes to memory, so that others never see a half of it.

    From memory that others write only 8 bytes can be copied so.  glibc copies 2 bytes as a word and then
    its first byte again, and 4 or 8 in two accesses of all of them; the kernel's copies of so few bytes go
    byte by byte.  A page that is lost would end in ``SIGBUS`` here: have :func:`read_memory` find that
    out before.
    """
    _memmove(to, source, length_bytes)


def _copy_all(name: str, call: Any, local: int, remote: int, length_bytes: int) -> None:
    done = 0
    while done < length_bytes:
        here, there = (_Iovec(at + done, length_bytes - done) for at in (local, remote))
        arguments = (os.getpid(), _byref(here), 1, _byref(there), 1, 0)
        where = partial(_range, remote + done, length_bytes - done)
        done += _made(name, PASSES, where, call, *arguments)


def write_pieces(fd: int, pieces: int, count: int, position: int | None = None) -> int:
    """Write pieces of memory one after the other, in one call; return how many bytes the kernel took.

    :param pieces: the address of ``count`` addresses and lengths (``struct iovec``).
    :param position: the byte of the file to write from on; None: where the descriptor stands.
    :raises OSError: as :func:`os.writev`; the caller knows what a channel's failures mean.
    """
    while True:
        if position is None:
            result: int = _writev(fd, pieces, count)
        else:
            result = _pwritev(fd, pieces, count, position)
        if result >= 0:
            return result
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, _LOST if error == errno.EFAULT else os.strerror(error))


def send_pieces(fd: int, pieces: int, count: int, flags: int) -> int:
    """As :func:`write_pieces`, over a socket: sendmsg(2) with ``flags``."""
    message = linux.msghdr(msg_iov=pieces, msg_iovlen=count)
    while True:
        result: int = _sendmsg(fd, _byref(message), flags)
        if result >= 0:
            return result
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, _LOST if error == errno.EFAULT else os.strerror(error))


def read_pieces(fd: int, pieces: int, count: int) -> int:
    """Read into pieces of memory, one after the other, in one call; return how many bytes, 0 = the end.

    :param pieces: as :func:`write_pieces`.
    :raises OSError: as :func:`os.readv`.
    """
    while True:
        result: int = _readv(fd, pieces, count)
        if result >= 0:
            return result
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def mincore(address: int, length_bytes: int, result_address: int) -> None:
    """Write one byte a 4 KiB page to ``result_address``; bit 0 says whether it is in memory."""
    where = partial(_range, address, length_bytes)
    _made("mincore", PASSES, where, lambda: _mincore(address, length_bytes, result_address))


def fallocate(fd: int, mode: int, offset: int, length_bytes: int) -> None:
    """Allocate a range of a file, or punch a hole into it; tried again when interrupted."""

    def where() -> str:
        return f"mode {mode} for {_range(offset, length_bytes)}"

    _made("fallocate", PASSES, where, lambda: _fallocate(fd, mode, offset, length_bytes))


def of_python(
    name: str,
    detail: str,
    call: Callable[Parameters, Result],
    *arguments: Parameters.args,
    **named: Parameters.kwargs,
) -> Result:
    """Make a call for which Python has a function, such as :func:`os.memfd_create`.

    :param name: of the kernel's call.
    :param detail: what it is about.
    :raises KernelError: in place of an ``OSError``.
    """
    try:
        return patience.persist(call, *arguments, **named)
    except OSError as error:
        raise KernelError(name, error.errno or 0, detail) from error


def _range(start: int, length_bytes: int) -> str:
    return f"[{start:#x}, {start + length_bytes:#x})"


def _made(
    name: str,
    passes: frozenset[int],
    where: Callable[[], str],
    call: Callable[..., int],
    *arguments: Any,
) -> int:
    result = call(*arguments)
    if result >= 0:
        return result
    return _outlive(name, passes, where, lambda: call(*arguments))


def _outlive(
    name: str, passes: frozenset[int], where: Callable[[], str], call: Callable[[], int]
) -> int:
    """Repeat a call that has just failed, as long as the failure may pass.

    :param where: returns what the call is about.
    :param call: returns a negative number when it has failed, with errno as ctypes has it.
    :raises KernelError: the failure has lasted, or is of another kind.
    """
    waits = Patience(passes)
    while waits.outlives(error := ctypes.get_errno()):
        result = call()
        if result >= 0:
            return result
    raise KernelError(name, error, where())


_T = TypeVar("_T")


def open_all(open_one: Callable[[_T], int], items: Iterable[_T]) -> list[int]:
    """Open one file for each item; when one cannot be opened, none stays open."""
    fds: list[int] = []
    try:
        for item in items:
            fds.append(open_one(item))  # noqa: PERF401 - those that are open are to be known
    except BaseException:
        close_all(fds)
        raise
    return fds


def close_all(fds: Iterable[int]) -> None:
    """Close these descriptors."""
    for fd in fds:
        os.close(fd)


def descriptors_lost(what: str, arrived: int, sent: int) -> HostCannot:
    """The error when descriptors were sent to this process and not all of them arrived."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    pid = os.getpid()
    return HostCannot(
        f"{what}: {arrived} of {sent} file descriptors arrived, since process {pid} may have {limit} "
        "files open",
        f"raise that limit ('prlimit --nofile=1024 --pid {pid}', 'ulimit -n') and try again",
    )
