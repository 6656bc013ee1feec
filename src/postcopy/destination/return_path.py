"""The messages of the destination: pongs, page requests, received-bitmaps, the result.

Used by the thread that loads records (pongs), the pager (requests) and the thread that loads the package.
One lock keeps their messages whole, and makes a request's "same block as before" true.
"""

import threading
from collections.abc import Sequence

from postcopy.channel.channel import Channel
from postcopy.errors import ChannelBroken
from postcopy.memory.ram_block import RamBlock
from postcopy.memory.runs import Mask
from postcopy.stream import return_path as wire
from postcopy.stream.pings import answer
from postcopy.stream.records import (
    Pong,
    RecvBitmapReply,
    RequestPages,
    ResumeAck,
    Shut,
    SwitchoverAck,
)


class ReturnPath:
    """The return path to the source, over the main channel's socket; closed until it is opened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._last_block: str | None = None
        self._requests_held = False

    def open(self, channel: Channel, *, hold_requests: bool = False) -> None:
        """Use this channel from now on; the next request names its block.

        :param hold_requests: request no page before :meth:`release_requests`: a source in recovery cannot
            serve any yet.
        """
        with self._lock:
            self._channel = channel
            self._last_block = None
            self._requests_held = hold_requests

    def release_requests(self) -> None:
        """The source is ready to serve."""
        with self._lock:
            self._requests_held = False

    def close(self) -> None:
        """Send nothing more."""
        with self._lock:
            self._channel = None

    @property
    def is_open(self) -> bool:
        """Whether the source has opened it."""
        return self._channel is not None

    def pong(self, value: int) -> None:
        """Answer a ping; see :func:`postcopy.stream.pings.answer`."""
        self._send(wire.encode_message(Pong(answer(value))))

    def shut(self, *, failed: bool) -> None:
        """Send the last message (``SHUT``): whether the guest has arrived."""
        self._send(wire.encode_message(Shut(1 if failed else 0)))

    def bitmap(self, block: str, received: Mask) -> None:
        """Send which target pages of a block are in place."""
        self._send(wire.encode_message(RecvBitmapReply(block, received)))

    def resume_ack(self) -> None:
        """Acknowledge the recovery (``RESUME_ACK``)."""
        self._send(wire.encode_message(ResumeAck(1)))

    def switchover_ack(self) -> None:
        """Let the source switch over (``SWITCHOVER_ACK``)."""
        self._send(wire.encode_message(SwitchoverAck()))

    def request(self, wanted: Sequence[tuple[RamBlock, int]]) -> None:
        """Request pages, all in one write."""
        with self._lock:
            if self._channel is None or self._requests_held:
                return  # paused: all of them are requested again after the recovery
            data = b"".join(self._request(block, page) for block, page in wanted)
            try:
                self._channel.send(data)
            except ChannelBroken:
                # The thread that reads the channel pauses the migration.  The pager must go on.
                self._channel = None

    def _request(self, block: RamBlock, page: int) -> bytes:
        name = None if block.name == self._last_block else block.name
        self._last_block = block.name
        size = block.page_size_bytes
        return wire.encode_message(RequestPages(name, page * size, size))

    def _send(self, data: bytes) -> None:
        with self._lock:
            if self._channel is not None:
                self._channel.send(data)
