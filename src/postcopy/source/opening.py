"""The first words of a stream: who we are, and what memory we have."""

from collections.abc import Sequence

from postcopy.memory.ram_block import TARGET_PAGE_BYTES, RamBlock
from postcopy.source.page_sender import RAM_SECTION_ID
from postcopy.stream import encoder
from postcopy.stream.commands import encode_command
from postcopy.stream.identity import IDENTITY_PING
from postcopy.stream.records import (
    BlockEntry,
    CommandRecord,
    Configuration,
    OpenReturnPath,
    Ping,
    PostcopyAdvise,
    RamSetup,
)

FIRST_PING = 1
"""QEMU's number for it."""


def opening(machine: str, blocks: Sequence[RamBlock], *, answered: bool, postcopy: bool) -> bytes:
    """Write everything up to the first page.

    :param answered: there is a return path to open.
    :param postcopy: say that postcopy may follow, so that the destination refuses now if it cannot.
    """
    parts = [encoder.stream_start(Configuration(machine))]
    if answered:
        greeting: list[CommandRecord] = [OpenReturnPath(), Ping(FIRST_PING), Ping(IDENTITY_PING)]
        parts += map(encode_command, greeting)
    if postcopy:
        sizes = 0
        for block in blocks:
            sizes |= block.page_size_bytes
        parts.append(encode_command(PostcopyAdvise(sizes, TARGET_PAGE_BYTES)))
    entries = tuple(_entry(block, postcopy=postcopy) for block in blocks)
    parts.append(encoder.ram_setup(RamSetup(RAM_SECTION_ID, entries), postcopy=postcopy))
    return b"".join(parts)


def _entry(block: RamBlock, *, postcopy: bool) -> BlockEntry:
    huge = block.page_size_bytes if block.target_pages_per_page > 1 and postcopy else None
    return BlockEntry(block.name, block.size_bytes, huge)
