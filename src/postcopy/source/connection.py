"""One connection to the destination, and everything that lives and ends with it."""

import threading

from postcopy.channel.channel import Channel
from postcopy.channel.rate_limit import RateLimiter
from postcopy.errors import PostcopyError
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import DirtyPages
from postcopy.source.page_sender import PageSender
from postcopy.source.postcopy import PostcopyPush
from postcopy.source.return_path import ReturnPath
from postcopy.stream.layout import BlockLayout
from postcopy.stream.return_path import ReturnPathDecoder


class Connection:
    """A channel with its sender, its push and its return path.

    A recovery makes another one; nothing of the old is used again but the pages it shares.

    :param answered: whether the destination can, and is going to, answer on the channel.
    """

    def __init__(
        self,
        channel: Channel,
        dirty: DirtyPages,
        limiter: RateLimiter,
        counters: Counters,
        interrupt: threading.Event,
        *,
        answered: bool,
    ) -> None:
        self.channel = channel
        self.sender = PageSender(channel, limiter, counters)
        self.push = PostcopyPush(dirty, self.sender, counters, interrupt)
        self.return_path: ReturnPath | None = None
        if answered:
            layout = {
                pages.block.name: BlockLayout(pages.block.size_bytes, pages.block.page_size_bytes)
                for pages in dirty.blocks
            }
            window = self.push.window
            self.return_path = ReturnPath(
                channel, ReturnPathDecoder(layout), self.push.serve, window.pong, window.close
            )
            self.return_path.start()

    @property
    def answers(self) -> ReturnPath:
        """The return path of a connection that must have one."""
        assert self.return_path is not None
        return self.return_path

    def finish(self) -> None:
        """Close it in order: for a file or a command this is when it proves to have worked."""
        self.channel.close()

    def abandon(self) -> None:
        """Break it; on return no thread of it touches a page any more.  Harmless when finished."""
        self.push.window.close()
        self.channel.shutdown()
        if self.return_path is not None:
            self.return_path.join()
        try:
            self.channel.close()
        except PostcopyError:
            pass  # it was over already
