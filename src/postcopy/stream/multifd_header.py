"""The header of a packet of multifd, as it stands on the wire; see :mod:`postcopy.stream.multifd`."""

from typing import Final

import numpy as np

MAGIC: Final = 0x11223344
"""Leads the initial packet and each other; a main channel begins with
:data:`postcopy.stream.numbers.MAGIC`."""
VERSION: Final = 1

PACKET_PAGES: Final = 128
"""Page slots of each packet: 512 KiB of pages of 4 KiB."""

HEADER: Final = np.dtype(
    [
        ("magic", ">u4"),
        ("version", ">u4"),
        ("flags", ">u4"),
        ("slots", ">u4"),
        ("normal", ">u4"),
        ("size", ">u4"),
        ("number", ">u8"),
        ("zero", ">u4"),
        ("reserved", "V28"),
        ("block", "V256"),
        ("offsets", ">u8", (PACKET_PAGES,)),
    ]
)
PACKET_BYTES: Final = HEADER.itemsize
