"""What all channels have in common: whole sends, counters, and a shutdown from another thread."""

import abc
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec, Self, TypeVar

from postcopy.channel.writev import IOV_MAX, PendingPieces
from postcopy.errors import ChannelBroken
from postcopy.kernel.patience import PASSES, Patience

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Target = TypeVar("Target")

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Buffer = bytes | bytearray | memoryview
"""What can be sent: contiguous bytes.  (``collections.abc.Buffer`` comes with Python 3.12.)"""


class Channel(abc.ABC):
    """Bytes to and from one peer.

    One thread may send while another receives; each direction has its lock, so that records of
    two senders never mix and ``close`` never pulls a descriptor from under a running call.

    :param description: the peer in one word, ``tcp:127.0.0.1:4444``; it stands in every error.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self.sent_bytes = 0
        self.received_bytes = 0
        self._sending = threading.Lock()
        self._receiving = threading.Lock()
        self._ending = threading.Lock()  # no thread wakes a descriptor that is being closed
        self._waits_for_all = False  # of the thread that receives
        self._aborted = False  # shutdown was called
        self._shut = False  # calls are refused from here
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    @abc.abstractmethod
    def can_return(self) -> bool:
        """Whether the peer can answer on it (a return path)."""

    @property
    def stores(self) -> bool:
        """Whether what is sent is stored until it is read: no machine runs it by itself."""
        return False

    @property
    def encrypted(self) -> bool:
        """Whether only the peer can read what is sent (TLS)."""
        return False

    def wait_for_room(self) -> None:  # noqa: B027  only a pipe needs it
        """Wait until a byte can be sent without a wait, as long as there is one sender.

        :raises ChannelBroken: as :meth:`send`.
        """

    def send(self, data: Buffer) -> None:
        """Send all of ``data``; the interpreter lock is free while the kernel takes it.

        :raises ChannelBroken: the peer is gone, or ``shutdown`` was called.
        """
        self.send_many((data,))

    def send_many(self, buffers: Sequence[Buffer]) -> None:
        """Send all of the buffers, in order, gathered into few kernel calls.

        :raises ChannelBroken: the peer is gone, or ``shutdown`` was called.
        """
        left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        with self._sending:
            while left:
                try:
                    n_sent = self._persist(self._send_some, left[:IOV_MAX])
                except (OSError, ValueError) as failure:
                    raise self._broken(failure) from failure
                self.sent_bytes += n_sent
                left = _rest(left, n_sent)

    def send_gathered(self, pieces: "npt.NDArray[np.uint64]") -> None:
        """Send all of many pieces of memory, in order, from where they lie.

        :param pieces: address and length in bytes of each, shape ``(n, 2)``, contiguous.  The memory is
            the caller's, and stays until this returns.
        :raises ChannelBroken: as :meth:`send`; or a page cannot be read, because it is lost.
        """
        left = PendingPieces(pieces)
        with self._sending:
            while left:
                try:
                    self.sent_bytes += self._persist(self._gather_some, left)
                except (OSError, ValueError) as failure:
                    raise self._broken(failure) from failure

    def send_if_idle(self, data: Buffer) -> bool:
        """Send a few bytes, unless that might have to wait: for another sender, or for room.

        :return: whether they were sent.
        :raises ChannelBroken: as :meth:`send`.
        """
        if not self._sending.acquire(blocking=False):
            return False
        try:
            if self.pending_output():
                return False
            self.sent_bytes += self._persist(self._send_some, [memoryview(data)])
        except (OSError, ValueError) as failure:
            raise self._broken(failure) from failure
        finally:
            self._sending.release()
        return True

    def receive_into(self, view: memoryview, *, whole: bool = False) -> int:
        """Receive at least one byte into ``view``, as many as there are and fit.

        :param whole: wait in the kernel until ``view`` is full, where that can be.
        :return: the number of bytes; 0 = the peer has ended the stream.
        :raises ChannelBroken: the peer is gone, or ``shutdown`` was called.
        """
        self._waits_for_all = whole
        return self._receive_with(self._receive_some, view)

    def receive_pieces(self, left: PendingPieces) -> int:
        """As :meth:`receive_into`, into many pieces of memory, one after the other; sockets only.

        The memory is the caller's, and stays until this returns.
        """
        return self._receive_with(lambda pieces: pieces.read(self.fileno()), left)

    def _receive_with(self, call: Callable[[Target], int], target: Target) -> int:
        with self._receiving:
            try:
                n_received = self._persist(call, target)
            except (OSError, ValueError) as failure:
                raise self._broken(failure) from failure
            # A socket shut down on this side reads as ended, which would look like a peer's end.
            if n_received == 0 and self._shut:
                raise self._broken(None)
            self.received_bytes += n_received
            return n_received

    def receive_ready_into(self, view: memoryview) -> int | None:
        """As :meth:`receive_into`, once one of :attr:`input_fds` is readable.

        :return: None: nothing has come after all, which only an encrypted channel may find.
        """
        return self.receive_into(view)

    def receive_all(self, view: memoryview, behind: memoryview | None = None) -> int:
        """Receive until ``view`` is full, and ``behind`` after it, in few calls.

        :return: how many bytes; fewer: the peer has ended the stream before.
        :raises ChannelBroken: as :meth:`receive_into`.
        """
        self._waits_for_all = True
        left = [view] if behind is None else [view, behind]
        done = 0
        while left:
            count = self._receive_with(self._receive_some_of, left)
            if not count:
                break
            done += count
            left = _rest(left, count)
        return done

    def shutdown(self) -> None:
        """Break the channel: threads that wait in ``send`` or ``receive_into`` raise.

        From any thread, any number of times; nothing is freed before ``close``.
        """
        self._aborted = True
        self._stop_calls()

    def close(self) -> None:
        """Close it; what was sent still arrives.  Any number of times.

        :raises ChannelBroken: what was sent is known not to have arrived (a full disk, a command
            that failed).
        """
        self._stop_calls()
        with self._sending, self._receiving:
            with self._ending:
                if self._closed:
                    return
                self._closed = True
            self._close()

    @abc.abstractmethod
    def fileno(self) -> int:
        """A descriptor to look at, or to hand to another process; -1 once it is closed."""

    @property
    def input_fds(self) -> tuple[int, ...]:
        """What to poll for input: one is readable when ``receive_into`` would return, or raise, at once."""
        return (self.fileno(),)

    @abc.abstractmethod
    def bound_buffers(self, n_bytes: int) -> None:
        """Let the kernel hold no more than about ``n_bytes`` each way, so nothing queues for long.

        Without meaning, and without effect, on a file or a pipe.
        """

    @abc.abstractmethod
    def pending_output(self) -> int:
        """Bytes sent that the peer has not taken yet (its kernel has not, on TCP)."""

    def watch(self, seconds: float) -> None:  # noqa: B027  only TCP needs to do anything
        """Break by itself when a TCP peer's host is silent for ``seconds`` (0: never); else no effect."""

    def delivered(self) -> None:  # noqa: B027  only a command needs it
        """The peer has reported that it has everything: the exit status of a command counts no more."""

    def leave(self) -> bool:
        """End what this process has started for the channel, which closes it.

        :return: whether there is such a thing: a command.
        """
        return False

    @abc.abstractmethod
    def _send_some(self, pieces: list[memoryview]) -> int:
        """Send one byte or more of the pieces, in one call."""

    @abc.abstractmethod
    def _gather_some(self, left: PendingPieces) -> int:
        """Send one byte or more of what is left, in one call."""

    @abc.abstractmethod
    def _receive_some(self, view: memoryview) -> int:
        """Receive one byte or more; 0 = end."""

    def _receive_some_of(self, views: list[memoryview]) -> int:
        """As :meth:`_receive_some`, into one after the other."""
        return self._receive_some(views[0])

    @abc.abstractmethod
    def _wake(self) -> None:
        """Make calls that wait in the kernel return."""

    def _persist(
        self,
        call: Callable[Parameters, Result],
        *arguments: Parameters.args,
        **named: Parameters.kwargs,
    ) -> Result:
        """Repeat a kernel call while its failure may pass, unless the channel is shut down."""
        waits: Patience | None = None
        while True:
            try:
                return call(*arguments, **named)
            except OSError as failure:
                waits = waits or Patience(PASSES)
                if self._shut or not waits.outlives(failure.errno or 0):
                    raise

    def _stop_calls(self) -> None:
        with self._ending:
            self._shut = True
            if not self._closed:
                self._wake()

    @abc.abstractmethod
    def _close(self) -> None:
        """Free the descriptors; no thread is in a call."""

    def _broken(self, failure: Exception | None) -> ChannelBroken:
        if self._shut or self._closed:
            return ChannelBroken(f"{self.description}: closed on this side")
        reason = failure.strerror if isinstance(failure, OSError) else None
        return ChannelBroken(f"{self.description}: {reason or failure}")


def _rest(pieces: list[memoryview], n_sent: int) -> list[memoryview]:
    """What is left of the pieces when so many bytes of them are gone."""
    for number, piece in enumerate(pieces):
        if n_sent < len(piece):
            return [piece[n_sent:], *pieces[number + 1 :]]
        n_sent -= len(piece)
    return []
