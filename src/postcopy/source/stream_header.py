"""The beginning of a stream: header, configuration, and what the destination must know before RAM."""

from collections.abc import Sequence

from postcopy.memory.ram_block import TARGET_PAGE_BYTES, RamBlock
from postcopy.parameters import Capabilities, Capability
from postcopy.stream import encoder
from postcopy.stream.commands import encode_command
from postcopy.stream.numbers import VALIDATED_CAPABILITIES
from postcopy.stream.pings import HEADER_PING, IDENTITY_PING
from postcopy.stream.records import (
    CommandRecord,
    Configuration,
    OpenReturnPath,
    Ping,
    PostcopyAdvise,
)


def configuration(machine: str, capabilities: Capabilities) -> Configuration:
    """The configuration section; it names those capabilities which a reader must have on, too."""
    names = tuple(name for name in VALIDATED_CAPABILITIES if Capability(name) in capabilities.on)
    return Configuration(machine, capabilities=names)


def stream_header(
    machine: str, blocks: Sequence[RamBlock], capabilities: Capabilities, *, answered: bool
) -> bytes:
    """Encode everything before the list of blocks.

    :param answered: there is a return path to open.
    """
    parts = [encoder.stream_start(configuration(machine, capabilities))]
    if answered:
        greeting: list[CommandRecord] = [OpenReturnPath(), Ping(HEADER_PING), Ping(IDENTITY_PING)]
        parts += map(encode_command, greeting)
    if capabilities.enabled(Capability.POSTCOPY_RAM):
        # Sent now, so that a destination without postcopy refuses now.
        sizes = 0
        for block in blocks:
            sizes |= block.page_size_bytes
        parts.append(encode_command(PostcopyAdvise(sizes, TARGET_PAGE_BYTES)))
    return b"".join(parts)
