"""Where pages go: as records onto a stream, or to their places in a file (mapped-ram)."""

from collections.abc import Callable, Sequence
from typing import Protocol

from postcopy.channel.channel import Channel
from postcopy.channel.files import check_seekable
from postcopy.channel.rate_limit import Interrupt, RateLimiter
from postcopy.memory.ram_block import PageBlock
from postcopy.memory.runs import Indices
from postcopy.multifd.sender import MultifdSender
from postcopy.multifd.threads import ALONE, FileAccess, FileThreads
from postcopy.parameters import Capabilities, Capability
from postcopy.source.counters import Counters, Rate
from postcopy.source.dirty_pages import BlockPages
from postcopy.source.file_sink import FileSink
from postcopy.source.multifd_sink import MultifdSink
from postcopy.source.wire_sink import Between, WireSink
from postcopy.source.xbzrle_sink import XbzrleSink
from postcopy.stream.records import PageRows


class PageSink(Protocol):
    """Takes the pages of one migration or snapshot; one thread at a time.

    :ivar sent_bytes: bytes of pages sent so far.
    :ivar rate: bytes a second of late.
    :ivar phase: the counter that :meth:`count` adds to, by its name in ``Counters``.
    """

    sent_bytes: int
    rate: Rate
    phase: str

    @property
    def limit(self) -> int:
        """The bandwidth limit now, in bytes a second; 0 = none."""

    def begin(self, blocks: Sequence[PageBlock], *, postcopy: bool) -> None:
        """Send the list of blocks (RAM's START section), before any page.

        :param postcopy: it has been advised.
        """

    def send(self, pages: BlockPages, batch: Indices, between: Between | None = None) -> int:
        """Send these pages of a block as they are now; return how many bytes that took.

        :param batch: pages of the block's own size, ascending.
        :param between: called between two pieces of huge pages; it may send over another channel.
        """

    def send_copies(self, block: str, target: Indices, contents: PageRows) -> int:
        """Send pages whose bytes were copied before; return how many bytes that took.

        :param target: pages of the wire (4 KiB), whatever the block's own are.
        :param contents: those pages and no others, in the order of ``target``.
        """

    def send_zeros(self, block: str, target: Indices) -> int:
        """Send pages of the wire that are known to be zero; return how many bytes that took."""

    def send_command(self, command: bytes) -> None:
        """Send a command behind the pages."""

    def pace(self, interrupt: Interrupt) -> None:
        """Wait as long as the bandwidth limit requires, unless interrupted."""

    def abandon(self) -> None:
        """Touch no page any more; any number of times."""

    def end_of_round(self) -> None:
        """All pages have been sent once: from here on one may be sent again."""

    def end_of_precopy(self) -> None:
        """The guest is about to run at the destination, which requests pages from now on."""

    def end_of_ram(self) -> bytes:
        """Finish all that is not in the stream, and return RAM's END section, to be sent next."""

    def count(self) -> None:
        """Bring the counters up to what has been sent."""


def page_sink_for(
    channel: Channel,
    capabilities: Capabilities,
    limiter: RateLimiter,
    counters: Counters,
    cache_bytes: Callable[[], int] = lambda: 0,
    multifd: MultifdSender | None = None,
    access: FileAccess = ALONE,
) -> PageSink:
    """Return the sink that these capabilities ask for.

    :param cache_bytes: the parameter ``xbzrle-cache-size`` as it is.
    :param multifd: the channels for precopy, if there are any.
    :param access: how a file with mapped-ram is written.
    :raises Refused: this channel cannot be one; it has been closed.
    :raises ChannelBroken: likewise.
    """
    if multifd is not None:
        return MultifdSink(channel, limiter, counters, multifd)
    if capabilities.enabled(Capability.XBZRLE):
        return XbzrleSink(channel, limiter, counters, cache_bytes)
    if not capabilities.enabled(Capability.MAPPED_RAM):
        return WireSink(channel, limiter, counters)
    file = check_seekable(channel)
    try:
        threads = FileThreads(file, access) if access.threads else None
    except BaseException:
        file.close()
        raise
    return FileSink(file, limiter, counters, threads)
