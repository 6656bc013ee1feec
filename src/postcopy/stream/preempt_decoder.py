"""The preempt channel: RAM records of urgent pages, without any framing around them."""

from collections.abc import Collection

from postcopy.stream.decoder_input import DecoderInput
from postcopy.stream.layout import Layout, Limits, Receiver
from postcopy.stream.ram_records import RamRecords
from postcopy.stream.reader import Incomplete
from postcopy.stream.records import Pages, ZeroPages


class PreemptDecoder(DecoderInput):
    """Decodes the preempt channel: urgent pages and nothing else.

    Its CONTINUE refers to blocks named on this channel.  Use it as
    :class:`postcopy.stream.decoder.Decoder`.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        limits: Limits | None = None,
        ignored_blocks: Collection[str] = (),
    ) -> None:
        super().__init__()
        receiver = Receiver(layout, frozenset(ignored_blocks))
        self._ram = RamRecords(receiver, limits or Limits())

    def next_record(self) -> Pages | ZeroPages | None:
        """Decode the next pages; ``None``: it needs more bytes.

        :raises StreamError: the stream is wrong.
        """
        try:
            # An EOS ends nothing here, but is tolerated.
            while (record := self._ram.read(self._reader)) is None:
                pass
        except Incomplete:
            self._reader.rollback()
            return None
        return record

    def finish(self) -> None:
        """Say that no more bytes will come.

        :raises StreamCut: they end in the middle of a page.
        """
        if self._reader.pending:
            raise self._cut("an urgent page")

    def resume(self) -> None:
        """Go on with a new connection: block names and half a page are forgotten."""
        self._reader.drop_all()
        self._ram.forget()
