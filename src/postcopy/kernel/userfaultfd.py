"""A userfaultfd: faults on a process's memory, reported to this program instead of the kernel.

Some facts, measured (``docs`` has more):

* Placing a run stops at a page that is there already: the call reports the bytes before it, and
  the next call, which begins at that page, is refused with ``EEXIST``.
* While the address space changes, or an event of such a change (remove, unmap, remap, fork) waits
  to be read, placing is refused with ``EAGAIN``: read the events, then go on.  Without events the
  change passes by itself.
* When the last descriptor is closed, all waiting threads go on and read *zeros*.  The process
  with the memory must therefore hold a duplicate while a page is missing.
* A second userfaultfd cannot register the same range (``EBUSY``).
"""

import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import Final, Self

from postcopy.abi import userfaultfd as abi
from postcopy.abi.ioctl import Argument, Ioctl
from postcopy.abi.userfaultfd import Feature, RangeIoctl, RegisterMode
from postcopy.errors import KernelError, PageExists
from postcopy.kernel import userfaultfd_open
from postcopy.kernel.calls import ioctl
from postcopy.kernel.patience import NONE, PASSES, Patience

NO_FEATURES = Feature(0)
WRITE_FEATURES: Final = Feature.WP_ASYNC | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED
"""For tracking writes: the kernel notes them by itself."""

MISSING_FEATURES: Final = (
    Feature.MISSING_SHMEM
    | Feature.MISSING_HUGETLBFS
    | Feature.MINOR_SHMEM
    | Feature.MINOR_HUGETLBFS
    | Feature.THREAD_ID
)
MISSING_MODE: Final = RegisterMode.MISSING | RegisterMode.MINOR
SNAPSHOT_FEATURES: Final = (
    Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED
)
MESSAGE: Final = struct.Struct("<B7xQQQ")
"""``struct uffd_msg``: the event's code, and the three words of its argument."""
_EVENTS = Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP


class Userfaultfd:
    """One descriptor, ours from now on, with the features that it was opened with.

    All addresses are of the process that opened it, in whichever process this object lives.
    All of it may be used from several threads at once.
    """

    def __init__(self, fd: int, features: Feature) -> None:
        self.fd = fd
        self.features = features
        self.tells_of_changes = bool(features & _EVENTS)
        """Whether changes of the address space come as events."""
        # With events the reader must read them first.
        self._passes = PASSES - {errno.EAGAIN} if self.tells_of_changes else PASSES
        self._hurried = threading.Event()

    @classmethod
    def open(cls, features: Feature = NO_FEATURES, *, user_mode_only: bool = False) -> Self:
        """Make a userfaultfd for this process's memory; not inherited by exec, never blocking.

        :param user_mode_only: faults inside system calls (and in ``KVM_RUN``) get ``EFAULT``
            instead of waiting; any user may have this.
        :raises HostCannot: not allowed, or a feature is missing; the cure is the least privilege
            that does.
        """
        return cls(userfaultfd_open.open_with(features, user_mode_only=user_mode_only), features)

    @classmethod
    def from_fd(cls, fd: int, features: Feature = NO_FEATURES) -> Self:
        """Take over a descriptor that another process opened with ``features``."""
        os.set_blocking(fd, False)  # a blocking userfaultfd answers poll with an error
        return cls(fd, features)

    def fileno(self) -> int:
        """For ``poll``: readable when events are pending."""
        return self.fd

    def patience(self) -> Patience:
        """For one call that is made through the descriptor."""
        return Patience(self._passes, self._hurried)

    def end_waits(self) -> None:
        """From now on raise each failure at once: no call is made again any more."""
        self._hurried.set()

    def register(self, address: int, length_bytes: int, mode: RegisterMode) -> RangeIoctl:
        """Watch a range, or change how it is watched; ``mode`` replaces what was there.

        :return: the requests that the range takes.
        :raises KernelError: ``EBUSY`` if another userfaultfd watches it; ``EINVAL`` if such memory
            cannot be watched so (this is how a kernel says that it cannot).
        """
        argument = abi.uffdio_register(abi.uffdio_range(address, length_bytes), mode)
        self._request(abi.UFFDIO_REGISTER, argument, address, length_bytes)
        return RangeIoctl(argument.ioctls)

    def unregister(self, address: int, length_bytes: int) -> None:
        """Watch a range no more: waiting threads go on, and what is missing reads as zeros."""
        argument = abi.uffdio_range(address, length_bytes)
        self._request(abi.UFFDIO_UNREGISTER, argument, address, length_bytes)

    def unregister_in_steps(
        self, address: int, length_bytes: int, step_bytes: int, rest_s: float = 0.0
    ) -> None:
        """As :meth:`unregister`, and threads that wait to write go on, too.

        :param step_bytes: what is let go of in one call, of whole pages: meanwhile the process can
            handle no fault.
        :param rest_s: between two calls.
        """
        for at in range(address, address + length_bytes, step_bytes):
            length = min(step_bytes, address + length_bytes - at)
            self.unregister(at, length)
            # That wakes threads that wait for a page, but not those that wait to write to one.
            self.wake(at, length)
            if rest_s:
                time.sleep(rest_s)

    def copy(
        self,
        destination: int,
        source: int,
        length_bytes: int,
        *,
        protect: bool = False,
        wake: bool = True,
    ) -> int:
        """Place pages at ``destination``, whole or not at all, and wake the threads that wait for them.

        :param source: an address in *this* process.
        :param protect: place them write-protected; the range must be registered for ``WP``.
        :return: the bytes placed.  Fewer than asked: the next page exists already, or the address
            space changed; 0, only with events: it is changing now.  Read them, then go on from there.
        :raises PageExists: the first page exists already.
        :raises KernelError: otherwise; ``ESRCH`` if the process is gone, ``ENOENT`` if the range is
            not registered (any more).
        """
        mode = (abi.UFFDIO_COPY_MODE_WP if protect else 0) | (
            0 if wake else abi.UFFDIO_COPY_MODE_DONTWAKE
        )
        argument = abi.uffdio_copy(destination, source, length_bytes, mode)
        return self._place(
            abi.UFFDIO_COPY, argument, lambda: argument.copy, destination, length_bytes
        )

    def zeropage(self, address: int, length_bytes: int, *, wake: bool = True) -> int:
        """Place pages of zeros, which takes no memory if the range is anonymous.

        :return: the bytes placed, as with :meth:`copy`.
        :raises PageExists: the first page exists already.
        :raises KernelError: ``EINVAL`` for huge pages, which have no page of zeros.
        """
        mode = 0 if wake else abi.UFFDIO_ZEROPAGE_MODE_DONTWAKE
        argument = abi.uffdio_zeropage(abi.uffdio_range(address, length_bytes), mode)
        return self._place(
            abi.UFFDIO_ZEROPAGE, argument, lambda: argument.zeropage, address, length_bytes
        )

    def map_existing(
        self, address: int, length_bytes: int, *, protect: bool = False, wake: bool = True
    ) -> int:
        """Map pages that the file already has (``UFFDIO_CONTINUE``): the answer to a minor fault.

        :return: the bytes mapped, as with :meth:`copy`.
        :raises PageExists: the first page is mapped already.
        :raises KernelError: ``EFAULT`` if the file does not have the page.
        """
        mode = (abi.UFFDIO_CONTINUE_MODE_WP if protect else 0) | (
            0 if wake else abi.UFFDIO_CONTINUE_MODE_DONTWAKE
        )
        argument = abi.uffdio_continue(abi.uffdio_range(address, length_bytes), mode)
        return self._place(
            abi.UFFDIO_CONTINUE, argument, lambda: argument.mapped, address, length_bytes
        )

    def poison(self, address: int, length_bytes: int, *, wake: bool = True) -> int:
        """Mark missing pages as lost: a thread that touches one gets ``SIGBUS``, never zeros.

        :return: the bytes marked, as with :meth:`copy`.
        :raises PageExists: the first page exists already.
        """
        mode = 0 if wake else abi.UFFDIO_POISON_MODE_DONTWAKE
        argument = abi.uffdio_poison(abi.uffdio_range(address, length_bytes), mode)
        return self._place(
            abi.UFFDIO_POISON, argument, lambda: argument.updated, address, length_bytes
        )

    def write_protect(
        self, address: int, length_bytes: int, *, protect: bool, wake: bool = True
    ) -> None:
        """Protect a range against writes, or allow them again and wake the threads that wait to write.

        :param wake: only means something when writes are allowed again.
        :raises KernelError: ``EAGAIN`` while the address space changes: read the events, try again;
            ``ENOENT`` if the range is not registered for ``WP``.
        """
        mode = abi.UFFDIO_WRITEPROTECT_MODE_WP if protect else 0
        if not (wake or protect):
            mode |= abi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        argument = abi.uffdio_writeprotect(abi.uffdio_range(address, length_bytes), mode)
        self._request(abi.UFFDIO_WRITEPROTECT, argument, address, length_bytes)

    def wake(self, address: int, length_bytes: int) -> None:
        """Wake waiting threads, which try again.

        A thread whose page is still missing faults once more.  That is how the pager of the next engine
        learns of faults that the last one had read and not served.
        """
        self._request(
            abi.UFFDIO_WAKE, abi.uffdio_range(address, length_bytes), address, length_bytes
        )

    def read_messages(self, limit: int) -> bytes:
        """Take up to ``limit`` pending events, oldest first, as :data:`MESSAGE` has them; empty: none.

        :raises KernelError: ``EINVAL`` if the descriptor has not been through its handshake.
        """
        waits: Patience | None = None
        while True:
            try:
                return os.read(self.fd, limit * MESSAGE.size)
            except BlockingIOError:
                return b""
            except OSError as error:
                waits = waits or self.patience()
                if not waits.outlives(error.errno or 0):
                    raise KernelError("read", error.errno or 0, "of a userfaultfd") from error

    def close(self) -> None:
        """Close the descriptor (see above what the last one does).  Harmless when closed."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place(
        self,
        request: Ioctl[Argument],
        argument: Argument,
        answer: Callable[[], int],
        address: int,
        length_bytes: int,
    ) -> int:
        """Make a request that places pages; return how many bytes it has placed.

        Without events nothing has to be read before the request can succeed: a change of the address
        space ends by itself, and the threads that wait for the page must be woken.
        """
        waits: Patience | None = None
        while True:
            try:
                ioctl(self.fd, request, argument, passes=NONE)
            except KernelError as error:
                if error.errno == errno.EAGAIN:
                    # The kernel's own answer is signed: bytes, or the negative errno if it did nothing.
                    done = max(answer(), 0)
                    if done or self.tells_of_changes:
                        return done
                waits = waits or self.patience()
                if not waits.outlives(error.errno):
                    raise _placing(error, address, length_bytes) from error
            else:
                return length_bytes

    def _request(
        self, request: Ioctl[Argument], argument: Argument, address: int, length_bytes: int
    ) -> None:
        waits: Patience | None = None
        while True:
            try:
                ioctl(self.fd, request, argument, passes=NONE)
            except KernelError as error:
                waits = waits or self.patience()
                if not waits.outlives(error.errno):
                    raise _located(error, address, length_bytes) from error
            else:
                return


def _placing(error: KernelError, address: int, length_bytes: int) -> KernelError:
    if error.errno == errno.EEXIST:
        return PageExists(error.call, error.errno, f"at {address:#x}")
    return _located(error, address, length_bytes)


def _located(error: KernelError, address: int, length_bytes: int) -> KernelError:
    where = f"[{address:#x}, {address + length_bytes:#x})"
    return KernelError(error.call, error.errno, where)


_ARGUMENT = struct.Struct("<QQQQq")
"""``struct uffdio_copy``: destination, source, length, mode, and the kernel's answer."""


class PageCopier:
    """Places single pages through one userfaultfd; for one thread.

    A thread waits for each of these pages, so there is as little around the call as possible:
    :meth:`Userfaultfd.copy`, for a run of any length, takes half as long again for a single page.

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
        :raises KernelError: ``EFAULT`` if the source cannot be read.
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
