"""A channel over descriptors that are no sockets: a file, a pipe, a device."""

import array
import fcntl
import os
import select
import stat
import termios
from collections.abc import Callable

from postcopy.channel.channel import Channel
from postcopy.channel.descriptor_check import can_answer
from postcopy.channel.writev import PendingPieces
from postcopy.errors import ChannelBroken
from postcopy.kernel import calls


class DescriptorChannel(Channel):
    """Takes over one descriptor for each direction that there is.

    A pipe cannot be shut down like a socket, so no thread waits in ``read`` or ``write``: they wait
    in ``poll``, for the pipe or for the wake-up descriptor.

    :param description: the peer, as it stands in errors.
    :param reading: where ``receive_into`` reads, or None.
    :param writing: where ``send`` writes, or None; may be the same as ``reading``.
    """

    def __init__(
        self, description: str, *, reading: int | None = None, writing: int | None = None
    ) -> None:
        super().__init__(description)
        self._reading = reading
        self._writing = writing
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        mode = 0 if writing is None else os.fstat(writing).st_mode
        self._stores = stat.S_ISREG(mode) or stat.S_ISBLK(mode)
        self._woken = calls.of_python("eventfd", "", os.eventfd, 0, flags)
        for fd in {reading, writing} - {None}:
            if fd is not None and not stat.S_ISREG(os.fstat(fd).st_mode):
                os.set_blocking(fd, False)

    @property
    def can_return(self) -> bool:
        """Only where both directions are open, and what comes is not what was sent."""
        if self._reading is None or self._writing is None:
            return False
        return self._reading != self._writing or can_answer(self._reading)

    @property
    def stores(self) -> bool:
        """See :attr:`Channel.stores`: a file and a disk do, a pipe does not."""
        return self._stores

    def wait_for_room(self) -> None:
        """See :meth:`Channel.wait_for_room`."""
        with self._sending:
            try:
                if self._writing is not None:
                    self._wait_for(self._writing, select.POLLOUT)
            except (OSError, ValueError) as failure:
                raise self._broken(failure) from failure

    def fileno(self) -> int:
        """The descriptor written to, or else the one read from."""
        fd = self._writing if self._writing is not None else self._reading
        return -1 if fd is None else fd

    @property
    def input_fds(self) -> tuple[int, ...]:
        """The descriptor read from, and the one by which ``shutdown`` wakes a reader."""
        return (self._woken,) if self._reading is None else (self._reading, self._woken)

    def bound_buffers(self, n_bytes: int) -> None:
        """No effect: a file has none, and a pipe's is small."""

    def pending_output(self) -> int:
        """Bytes in the pipe; 0 for a file."""
        count = array.array("i", [0])
        writing = self._writing
        if writing is None or not stat.S_ISFIFO(os.fstat(writing).st_mode):
            return 0
        fcntl.ioctl(writing, termios.FIONREAD, count)
        return count[0]

    def _send_some(self, pieces: list[memoryview]) -> int:
        return self._write(lambda fd: os.writev(fd, pieces))

    def _gather_some(self, left: PendingPieces) -> int:
        return self._write(left.write)

    def _write(self, write: Callable[[int], int]) -> int:
        if self._writing is None:
            raise ValueError("it can only be read from")
        while True:
            self._wait_for(self._writing, select.POLLOUT)
            try:
                return write(self._writing)
            except BlockingIOError:
                continue  # another process filled the pipe between poll and write

    def _receive_some(self, view: memoryview) -> int:
        if self._reading is None:
            raise ValueError("it can only be written to")
        while True:
            self._wait_for(self._reading, select.POLLIN)
            try:
                return os.readv(self._reading, [view])
            except BlockingIOError:
                continue

    def _wait_for(self, fd: int, event: int) -> None:
        poll = select.poll()
        poll.register(fd, event)
        poll.register(self._woken, select.POLLIN)
        if any(ready == self._woken for ready, _ in calls.of_python("poll", "", poll.poll)):
            raise ValueError("shut down")

    def _wake(self) -> None:
        os.eventfd_write(self._woken, 1)

    def _close(self) -> None:
        fds = {self._reading, self._writing, self._woken} - {None}
        self._reading = self._writing = None
        failures = [failure for fd in fds if fd is not None and (failure := _close_one(fd))]
        if failures:
            raise ChannelBroken(f"{self.description}: {failures[0].strerror}")


def _close_one(fd: int) -> OSError | None:
    try:
        os.close(fd)
    except OSError as failure:
        return failure
    return None
