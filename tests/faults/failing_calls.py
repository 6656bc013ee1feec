"""Kernel calls that fail, in all processes of ours together: ``failing_calls.c`` and its table."""

import ctypes
import errno
import mmap
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from postcopy.abi import kvm, pagemap, userfaultfd
from postcopy.abi.ioctl import Ioctl, PlainIoctl

VARIABLE = "POSTCOPY_FAILING_CALLS"
SOURCE = Path(__file__).with_suffix(".c")
ANY = (1 << 64) - 1
FROM_THEN_ON = 0
ROWS = 128


@dataclass(frozen=True)
class Kind:
    """One kind of call.

    :ivar name: as errors have it.
    :ivar function: of the C library.
    :ivar request: of an ioctl, number of a syscall, flag of an mmap, and so on.
    :ivar target: part of what the descriptor stands for, or the end of the path; ``@unix``, ``@inet``: a
        socket of that family.  The link between processes is of the first, a channel of most journeys of
        the second.
    """

    name: str
    function: str
    request: int = ANY
    target: str = ""


def _ioctl(request: Ioctl | PlainIoctl) -> Kind:
    return Kind(request.name, "ioctl", request.number)


KINDS = (
    *map(
        _ioctl,
        (
            userfaultfd.USERFAULTFD_IOC_NEW,
            userfaultfd.UFFDIO_API,
            userfaultfd.UFFDIO_REGISTER,
            userfaultfd.UFFDIO_UNREGISTER,
            userfaultfd.UFFDIO_WAKE,
            userfaultfd.UFFDIO_COPY,
            userfaultfd.UFFDIO_ZEROPAGE,
            userfaultfd.UFFDIO_CONTINUE,
            userfaultfd.UFFDIO_POISON,
            userfaultfd.UFFDIO_WRITEPROTECT,
            pagemap.PAGEMAP_SCAN,
            kvm.KVM_SET_USER_MEMORY_REGION,
            kvm.KVM_GET_DIRTY_LOG,
            kvm.KVM_SET_SIGNAL_MASK,
            kvm.KVM_RUN,
            *(kvm.KVM_GET_REGS, kvm.KVM_SET_REGS, kvm.KVM_GET_SREGS, kvm.KVM_SET_SREGS),
            *(kvm.KVM_GET_XSAVE, kvm.KVM_SET_XSAVE, kvm.KVM_GET_XCRS, kvm.KVM_SET_XCRS),
            *(kvm.KVM_GET_DEBUGREGS, kvm.KVM_SET_DEBUGREGS, kvm.KVM_GET_MSRS, kvm.KVM_SET_MSRS),
            *(kvm.KVM_GET_MP_STATE, kvm.KVM_SET_MP_STATE),
            *(kvm.KVM_GET_VCPU_EVENTS, kvm.KVM_SET_VCPU_EVENTS),
        ),
    ),
    Kind("mmap", "mmap", mmap.MAP_SHARED),
    Kind("madvise", "madvise"),
    Kind("process_madvise", "syscall", 440),
    Kind("pidfd_open", "syscall", 434),
    Kind("mincore", "mincore"),
    Kind("fallocate", "fallocate"),
    Kind("process_vm_readv", "process_vm_readv"),
    Kind("memfd_create", "memfd_create"),
    Kind("ftruncate", "ftruncate"),
    Kind("lseek(SEEK_DATA)", "lseek", os.SEEK_DATA),
    Kind("lseek(SEEK_HOLE)", "lseek", os.SEEK_HOLE),
    Kind("read", "read", target="[userfaultfd]"),
    Kind("poll", "poll"),
    Kind("eventfd", "eventfd"),
    Kind("pipe2", "pipe2"),
    Kind("open", "open", target="/pagemap"),
    Kind("pread", "pread"),
    Kind("preadv", "preadv"),
    Kind("pwrite", "pwrite"),
    Kind("pwritev", "pwritev"),
    Kind("writev", "writev"),
    Kind("readv", "readv"),
    *(Kind(f"{name} of a link", name, target="@unix") for name in ("send", "sendmsg", "recvmsg")),
    *(Kind(f"{name} of a channel", name, target="@inet") for name in ("send", "sendmsg", "recv")),
    *(Kind(name, name) for name in ("socket", "socketpair", "connect", "accept")),
    *(Kind(name, name) for name in ("pthread_create", "fork", "execve")),
    Kind("fsync", "fsync"),
)
BY_NAME = {kind.name: kind for kind in KINDS}
ERRNOS = tuple(
    getattr(errno, name)
    for name in ("ENOMEM", "EAGAIN", "EINTR", "EIO", "ENOSPC", "EMFILE", "EBADF", "ESRCH")
)
TIMES = (1, 3, FROM_THEN_ON)


class _Row(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 32),
        ("target", ctypes.c_char * 32),
        ("request", ctypes.c_uint64),
        ("error", ctypes.c_int32),
        ("pid", ctypes.c_int32),
        ("first", ctypes.c_uint64),
        ("times", ctypes.c_uint64),
        ("seen", ctypes.c_uint64),
        ("failed", ctypes.c_uint64),
    )


class _Table(ctypes.Structure):
    _fields_ = (("armed", ctypes.c_uint64), ("rows", _Row * ROWS))


def build(folder: Path) -> Path:
    """Compile the library."""
    made = folder / "failing_calls.so"
    if not made.exists():
        command = ["gcc", "-Wall", "-Werror", "-O2", "-shared", "-fPIC", "-o", made, SOURCE, "-ldl"]
        subprocess.run(command, check=True)
    return made


def environment(folder: Path) -> dict[str, str]:
    """What a process needs in which, and in whose children, calls are to fail."""
    return {"LD_PRELOAD": str(build(folder)), VARIABLE: str(make_table(folder))}


def make_table(folder: Path) -> Path:
    table = folder / "table"
    table.write_bytes(bytes(ctypes.sizeof(_Table)))
    return table


class FailingCalls:
    """The table, for a process that was started with :func:`environment`."""

    def __init__(self) -> None:
        with open(os.environ[VARIABLE], "r+b") as file:  # noqa: PTH123
            self._memory = mmap.mmap(file.fileno(), ctypes.sizeof(_Table))
        self._table = _Table.from_buffer(self._memory)
        for row, kind in zip(self._table.rows, KINDS, strict=False):
            row.name, row.target = kind.function.encode(), kind.target.encode()
            row.request = kind.request

    def set(self, kind: Kind | None, error: int = 0, first: int = 1, times: int = 1) -> None:
        """Have calls of this kind fail, from :meth:`arm` on; all others are only counted."""
        self.disarm()
        for row, each in zip(self._table.rows, KINDS, strict=False):
            row.error = error if each is kind else 0
            row.first, row.times, row.seen, row.failed = first, times, 0, 0

    def arm(self) -> None:
        self._table.armed = 1

    def disarm(self) -> None:
        self._table.armed = 0

    def failed(self) -> int:
        """How many calls have been made to fail."""
        return sum(row.failed for row in self._table.rows)

    def seen(self) -> dict[str, int]:
        """How many calls of each kind there were."""
        rows = zip(self._table.rows, KINDS, strict=False)
        return {kind.name: row.seen for row, kind in rows if row.seen}
