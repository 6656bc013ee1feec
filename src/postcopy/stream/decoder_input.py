"""What every decoder of a channel has: a buffer to receive into, and a position."""

from postcopy.errors import StreamCut
from postcopy.stream.reader import BytesLike, StreamBuffer


class DecoderInput:
    """The receiving half of a decoder.  One thread only."""

    def __init__(self) -> None:
        self._reader = StreamBuffer()

    def buffer(self) -> memoryview:
        """Give the free space to receive into; ends the life of :class:`Pages` given out."""
        return self._reader.buffer()

    def received(self, count: int) -> None:
        """Say that ``count`` bytes of what :meth:`buffer` gave have been filled."""
        self._reader.received(count)

    def feed(self, data: BytesLike) -> None:
        """Take a copy of ``data``; better hand :meth:`buffer` to the socket."""
        self._reader.feed(data)

    @property
    def position(self) -> int:
        """Bytes consumed, from the start of the stream or package."""
        return self._reader.consumed

    def _cut(self, element: str) -> StreamCut:
        reader = self._reader
        return StreamCut(f"The stream ends in {element}", reader.consumed + reader.pending)
