"""A channel over a file or a block device: a stream from some byte on, and any other place besides."""

import errno
import os

from postcopy.channel.channel import Buffer, Channel
from postcopy.channel.writev import PendingPieces
from postcopy.errors import ChannelBroken, HostCannot, Refused

PIECE_BYTES = 16 << 20
"""How much is read or written in one call, so that a cancel does not wait long."""
PAGE_BYTES = 4096
"""What ``O_DIRECT`` is used with: places in a mapped-ram file are multiples of it."""


class FileChannel(Channel):
    """Takes over a descriptor; the kernel's own position in the file is never used.

    :param description: the file, as it stands in errors.
    :param position: byte of the file at which the stream goes on.
    :param writable: it is open for writing, and else for reading.
    :param direct: it was opened with ``O_DIRECT``: places and lengths are whole pages.
    """

    def __init__(
        self,
        description: str,
        fd: int,
        position: int = 0,
        *,
        writable: bool,
        direct: bool = False,
    ) -> None:
        super().__init__(description)
        self._direct = direct
        self._fd = fd
        self._writable = writable
        self._position = position

    @property
    def stores(self) -> bool:
        """See :attr:`Channel.stores`: a file does."""
        return True

    @property
    def position(self) -> int:
        """Byte of the file at which the stream goes on."""
        return self._position

    def seek(self, position: int) -> None:
        """Let the stream go on at another byte of the file; only between two calls."""
        self._position = position

    @property
    def size_bytes(self) -> int:
        """How long the file is now."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    def duplicate(self, *, direct: bool = False) -> "FileChannel":
        """Another channel over the same file, for places; the stream goes on over this one alone.

        :param direct: past the page cache (``O_DIRECT``).
        :raises ChannelBroken: there can be no more descriptors.
        :raises HostCannot: the file's file system has no ``O_DIRECT``.
        """
        try:
            fd = self._open_direct() if direct else self._persist(os.dup, self._fd)
        except OSError as failure:
            raise self._broken(failure) from failure
        return FileChannel(self.description, fd, writable=self._writable, direct=direct)

    def _open_direct(self) -> int:
        # A duplicate would share its flags with this one, whose stream has no alignment.
        flags = os.O_DIRECT | os.O_CLOEXEC | (os.O_WRONLY if self._writable else os.O_RDONLY)
        try:
            return self._persist(os.open, f"/proc/self/fd/{self._fd}", flags)
        except OSError as failure:
            if failure.errno != errno.EINVAL:
                raise
            raise HostCannot(
                f"{self.description}: filesystem does not support O_DIRECT",
                "switch direct-io off, or give a file on another file system",
            ) from failure

    def write_at(self, position: int, data: Buffer) -> None:
        """Write all of ``data`` from a byte of the file on; the stream goes on where it was.

        :raises ChannelBroken: there is no room, or ``shutdown`` was called.
        """
        left = memoryview(data).cast("B")
        with self._sending:
            try:
                while len(left):
                    self._check(writing=True)
                    piece = left[:PIECE_BYTES]
                    n_written = self._persist(os.pwrite, self._fd, piece, position)
                    self.sent_bytes += n_written
                    position += n_written
                    left = left[n_written:]
            except (OSError, ValueError) as failure:
                raise self._broken(failure) from failure

    def read_at(self, position: int, into: memoryview) -> int:
        """Read from a byte of the file on until ``into`` is full; the stream goes on where it was.

        :return: the bytes read; fewer than asked for only where the file ends.
        :raises ChannelBroken: the file cannot be read, or ``shutdown`` was called.
        """
        done = 0
        with self._receiving:
            try:
                while done < len(into):
                    self._check(writing=False)
                    piece = into[done : done + PIECE_BYTES]
                    n_read = self._persist(os.preadv, self._fd, [piece], position + done)
                    done += n_read
                    # What ends within a page is the end; O_DIRECT cannot go on from there.
                    if not n_read or (self._direct and n_read % PAGE_BYTES):
                        break
            except (OSError, ValueError) as failure:
                raise self._broken(failure) from failure
            self.received_bytes += done
        return done

    # --- as a channel

    @property
    def can_return(self) -> bool:
        """A file never answers."""
        return False

    def fileno(self) -> int:
        """The file."""
        return self._fd

    def bound_buffers(self, n_bytes: int) -> None:
        """No effect: nothing queues in a file."""

    def pending_output(self) -> int:
        """Nothing: the file has what was sent."""
        return 0

    def _send_some(self, pieces: list[memoryview]) -> int:
        self._check(writing=True)
        n_written = os.pwritev(self._fd, pieces, self._position)
        self._position += n_written
        return n_written

    def _gather_some(self, left: PendingPieces) -> int:
        self._check(writing=True)
        n_written = left.write_at(self._fd, self._position)
        self._position += n_written
        return n_written

    def _receive_some(self, view: memoryview) -> int:
        self._check(writing=False)
        n_read = os.preadv(self._fd, [view], self._position)
        self._position += n_read
        return n_read

    def _check(self, *, writing: bool) -> None:
        if self._shut:
            raise ValueError("shut down")
        if writing is not self._writable:
            raise ValueError(f"it can only be {'written to' if self._writable else 'read from'}")

    def _broken(self, failure: Exception | None) -> ChannelBroken:
        broken = super()._broken(failure)
        if self._direct and isinstance(failure, OSError) and failure.errno == errno.EINVAL:
            return ChannelBroken(
                f"{broken}; its disk may take no direct I/O in pages of {PAGE_BYTES} bytes: switch "
                "direct-io off"
            )
        return broken

    def _wake(self) -> None:
        """No thread waits: each call looks whether it is still wanted."""

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        try:
            os.close(fd)
        except OSError as failure:
            raise ChannelBroken(f"{self.description}: {failure.strerror}") from failure


def check_seekable(channel: Channel) -> FileChannel:
    """The channel, if pages can have places on it.

    :raises Refused: it is a pipe or the like; it has been closed.
    """
    if isinstance(channel, FileChannel):
        return channel
    channel.close()
    raise Refused(
        f"mapped-ram needs a file in which pages have places, which {channel.description} is not"
    )
