"""The virtio block device (virtio 1.2, section 5.2): feature bits, configuration, requests."""

import struct
from enum import IntEnum, IntFlag
from typing import Final

SECTOR_BYTES: Final = 512
"""The unit of capacity and position, whatever the block size is."""

ID_BYTES: Final = 20

HEADER: Final = struct.Struct("<IIQ")
"""What a request begins with: type, reserved, first sector (5.2.6)."""


class BlockFeature(IntFlag):
    """Feature bits of the block device (5.2.3)."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14


class RequestType(IntEnum):
    """What a request wants (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class BlockStatus(IntEnum):
    """How a request ended: the last byte of what the device writes."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


_CONFIGURATION: Final = struct.Struct("<QIIHBBIBBHIBxH20xB3x12x")


def configuration(
    capacity_sectors: int, *, most_segments: int, block_bytes: int, queues: int
) -> bytes:
    """The device's configuration space (5.2.4); what belongs to features not offered is 0.

    :param most_segments: buffers of data in one request.
    """
    return _CONFIGURATION.pack(
        capacity_sectors, 0, most_segments, 0, 0, 0, block_bytes, 0, 0, 0, 0, 0, queues, 0
    )
