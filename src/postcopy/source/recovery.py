"""Resume a broken postcopy.

Source: QEMU's ``docs/devel/migration/postcopy.rst``, "Postcopy Recovery".  The destination sends which
pages it has; all others are pending again.  A page that was under way when the link broke is
sent again; one that had arrived never is, since the guest may have written to it.
"""

from collections.abc import Callable

import numpy as np

from postcopy.errors import StreamError
from postcopy.memory.runs import Mask
from postcopy.source.connection import Connection
from postcopy.source.dirty_pages import BlockPages, DirtyPages
from postcopy.stream.commands import encode_command
from postcopy.stream.records import PostcopyResume, RecvBitmap
from postcopy.trace import trace


def agree_on_what_is_missing(
    connection: Connection, dirty: DirtyPages, open_preempt: Callable[[], None]
) -> None:
    """Ask for the received-bitmap of each block, then resume.

    :param open_preempt: opens the second connection, if there is one; QEMU opens it at this point.
    :raises ChannelBroken: this connection has broken as well; another recovery may follow.
    :raises StreamError: the peer is not the destination of this migration.
    """
    for pages in dirty.blocks:
        connection.channel.send(encode_command(RecvBitmap(pages.block.name)))
        trace("source.bitmap-asked")
        received = connection.answers.wait_bitmap(pages.block.name)
        _take_over(pages, received)
        trace("source.bitmap-taken")
    open_preempt()
    connection.channel.send(encode_command(PostcopyResume()))
    trace("source.resume-sent")
    connection.answers.wait_resume_ack()
    trace("source.resume-acknowledged")


def _take_over(pages: BlockPages, received: Mask) -> None:
    per_page = pages.block.target_pages_per_page
    if len(received) != len(pages.pending) * per_page:
        raise StreamError(f"the bitmap of block '{pages.block.name}' is not as long as the block")
    # A huge page is there when all of its pieces are.
    whole: Mask = np.logical_and.reduceat(received, np.arange(0, len(received), per_page))
    pages.pending = ~whole
