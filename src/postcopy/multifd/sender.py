"""The channels of multifd at a source: a thread each, which take packets from one queue.

The pages of a packet are read when they are sent, so that one which is written to meanwhile may go out
torn: it is dirty then, and is sent again in a later round.  Between two rounds comes a SYNC on each channel
(:meth:`MultifdSender.sync`): no page of an earlier round is placed over one of a later.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.channel.channel import Channel
from postcopy.channel.peer_timeout import AckedBytes
from postcopy.channel.sockets import SocketChannel
from postcopy.errors import ChannelBroken, PostcopyError
from postcopy.multifd.threads import MultifdThreads
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.stream.multifd_encoder import (
    COMPRESSORS,
    Headers,
    encode_initial,
    encode_sync,
    gathered,
    page_headers,
    page_pieces,
    zero_headers,
)
from postcopy.stream.multifd_header import PACKET_PAGES
from postcopy.stream.records import Offsets, PageRows

_JOB_PAGES: Final = 8 * PACKET_PAGES
"""Sent by a channel before it looks for more: 4 MiB."""

_NO_ROWS: Final = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Compression:
    """How the pages are compressed: ``multifd-compression``, and the level for it."""

    name: str = "none"
    level: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Packets for one channel: those of the pages ``rows`` of ``source``, or of zero pages."""

    headers: Headers
    source: PageRows | None
    rows: npt.NDArray[np.int64]

    def packets(self) -> Iterator[tuple[Headers, npt.NDArray[np.int64]]]:
        """The header of each packet, to be changed in place, and the rows of its pages."""
        for number in range(len(self.headers)):
            rows = self.rows[number * PACKET_PAGES : (number + 1) * PACKET_PAGES]
            yield self.headers[number : number + 1], rows


class _Member:
    """One channel, used by its own thread."""

    def __init__(self, channel: Channel, number: int, compression: Compression) -> None:
        self.channel = channel
        self.number = number
        self.acked = AckedBytes(channel)
        self.syncs = 0  # under the sender's lock
        make = COMPRESSORS.get(compression.name)
        self._compress = None if make is None else make(compression.level)

    def send(self, job: _Job) -> None:
        if job.source is None:
            self.channel.send(job.headers.tobytes())
        elif self._compress is None:
            self.channel.send_gathered(gathered(job.headers, job.source, job.rows))
        else:
            for header, rows in job.packets():
                data = self._compress(job.source[rows].data.cast("B"))
                header["size"] = len(data)
                self.channel.send_many((header.tobytes(), data))

    def finish(self) -> bool:
        """Wait until the kernel reads no page any more; return whether it had to copy what it need not."""
        return False


class _UncopiedMember(_Member):
    """One whose pages the kernel sends from where they are (``zero-copy-send``).

    A page that the guest writes before it has gone out may arrive torn, as one that is written while it is
    copied: it is dirty then, and is sent again.  Nothing writes to the pages of the last round, since the
    guest has been stopped before it.  The headers are copied, so that only guest memory has to stay.
    """

    def __init__(self, channel: Channel, number: int, compression: Compression) -> None:
        super().__init__(channel, number, compression)
        assert isinstance(
            channel, SocketChannel
        )  # other addresses are refused before anything begins
        channel.send_uncopied()
        self._socket = channel
        self._held: list[PageRows] = []  # what the kernel may still read

    def send(self, job: _Job) -> None:
        if job.source is None:
            self.channel.send(job.headers.tobytes())
            return
        if not self._held or self._held[-1] is not job.source:
            self._held.append(job.source)
        for header, rows in job.packets():
            self.channel.send(header.tobytes())
            self.channel.send_gathered(page_pieces(job.source, rows))

    def finish(self) -> bool:
        missed = self._socket.finish_uncopied()
        self._held.clear()
        return missed


class MultifdSender(MultifdThreads):
    """Sends pages over several channels.  One thread calls all but :meth:`shutdown`.

    :ivar zero_pages: the parameter ``zero-page-detection``.
    :ivar on_failure: called in the thread of a channel that has failed.
    """

    def __init__(
        self, compression: Compression, zero_pages: str = "multifd", *, zero_copy: bool = False
    ) -> None:
        super().__init__()
        self.zero_pages = zero_pages
        self._make_member = _UncopiedMember if zero_copy else _Member
        self._compression = compression
        self.on_failure: Callable[[PostcopyError], None] = lambda _: None
        self._members: list[_Member] = []
        # Under `_changed`:
        self._jobs: deque[_Job] = deque()
        self._syncs = 0  # that each channel has to send
        self._packets = 0
        self._missed_zero_copy = 0
        self._unsynced = (
            False  # for the one thread that calls: whether there are pages since the last
        )

    def add(self, channel: Channel) -> None:
        """Use one more channel, which becomes ours; its destination is told at once what it is.

        :raises ChannelBroken: it has broken already.
        :raises HostCannot: there can be no more threads, or no sending without a copy.
        """
        member = self._make_member(channel, len(self._members), self._compression)
        self._members.append(member)
        channel.send(encode_initial(member.number))
        self._start(partial(self._run, member))

    @property
    def sent_bytes(self) -> int:
        """Bytes sent so far, on all channels."""
        return sum(member.channel.sent_bytes for member in self._members)

    @property
    def missed_zero_copy(self) -> int:
        """In how many rounds of a channel the kernel has copied all that it should have sent uncopied."""
        return self._missed_zero_copy

    @property
    def taken_bytes(self) -> int:
        """Bytes that the destination has taken, as far as is known."""
        return sum(member.acked.of(member.channel.sent_bytes) for member in self._members)

    def queue_pages(
        self, block: str, offsets: Offsets, source: PageRows, rows: npt.NDArray[np.int64]
    ) -> None:
        """Send pages of a block by and by.

        :param offsets: byte offsets in the block.
        :param source: rows of 4096 bytes, contiguous; they must stay until :meth:`sync` or :meth:`close`.
        :param rows: which of these are the pages.
        :raises PostcopyError: a channel has failed.
        """
        for first in range(0, len(offsets), _JOB_PAGES):
            part = slice(first, first + _JOB_PAGES)
            headers = page_headers(block, offsets[part], self._compression.name)
            self._queue(_Job(headers, source, rows[part]))

    def queue_zeros(self, block: str, offsets: Offsets) -> None:
        """As :meth:`queue_pages`, of pages that are zero."""
        if len(offsets):
            self._queue(_Job(zero_headers(block, offsets, self._compression.name), None, _NO_ROWS))

    def _queue(self, job: _Job) -> None:
        with self._changed:
            self._wait_until(lambda: len(self._jobs) < len(self._members))
            job.headers["number"] = np.arange(len(job.headers)) + self._packets
            self._packets += len(job.headers)
            self._jobs.append(job)
            self._unsynced = True
            self._changed.notify_all()

    @property
    def unsynced(self) -> bool:
        """Whether pages have been queued since the last :meth:`sync`."""
        return self._unsynced

    def sync(self) -> None:
        """Send all that is queued, and then a SYNC on each channel.

        :raises PostcopyError: a channel has failed.
        """
        with self._changed:
            self._syncs += 1
            self._unsynced = False
            self._changed.notify_all()
            self._wait_until(lambda: all(member.syncs == self._syncs for member in self._members))

    def shutdown(self) -> None:
        """Break all channels; any number of times, from any thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for member in tuple(self._members):
            member.channel.shutdown()

    def close(self) -> None:
        """Close all channels; on return no page is touched any more.  What has been sent still arrives."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
        self._join()
        for member in self._members:
            member.channel.close()

    # --- the threads "multifd-N"

    def _run(self, member: _Member) -> None:
        try:
            while self._send_next(member):
                pass
        except PostcopyError as error:
            # A first SYNC comes before all pages; the kernel takes it, though the peer ignores the channel.
            if member.syncs <= 1 and isinstance(error, ChannelBroken):
                error = ChannelBroken(
                    f"{error}; is multifd switched on there, with as many multifd-channels?"
                )
            with self._changed:
                first = not self._is_over()
                self._failure = self._failure or error
                self._changed.notify_all()
            if first:
                self.on_failure(error)

    def _send_next(self, member: _Member) -> bool:
        """Send the next packets, or a SYNC; return False when there is nothing more to send."""
        with self._changed:
            if not self._wait_for_work(lambda: bool(self._jobs) or member.syncs < self._syncs):
                return False
            job = self._jobs.popleft() if self._jobs else None
            number = self._packets
            if job is None:
                self._packets += 1
            self._changed.notify_all()
        if job is not None:
            member.send(job)
            return True
        member.channel.send(encode_sync(number))
        missed = member.finish()
        with self._changed:
            member.syncs += 1
            self._missed_zero_copy += missed
            self._changed.notify_all()
        return True


def sender_for(capabilities: Capabilities, parameters: Parameters) -> MultifdSender | None:
    """Return what sends as the user wants it, without a channel yet; None: over no channels."""
    if Capability.MULTIFD not in capabilities.on or Capability.MAPPED_RAM in capabilities.on:
        return None
    name = parameters.multifd_compression
    levels = {"zlib": parameters.multifd_zlib_level, "zstd": parameters.multifd_zstd_level}
    compression = Compression(name, levels.get(name, 1))
    zero_copy = capabilities.enabled(Capability.ZERO_COPY_SEND)
    return MultifdSender(compression, parameters.zero_page_detection, zero_copy=zero_copy)
