"""The header of a packet of multifd, as it stands on the wire; see :mod:`postcopy.stream.multifd`.

Packets that say of pages that they are zero are nothing but headers, and are decoded many at once.  A guest
that has used a part of its memory has mostly such packets, and to decode one by itself takes as long as to
receive half a MiB of pages.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.stream.records import Offsets

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

MOST_BYTES: Final = 64 * PACKET_BYTES
"""Of packets decoded at once."""

_SLOTS: Final = np.arange(PACKET_PAGES)


def leading_zeros(raw: memoryview, name: bytes, flags: int) -> tuple[int, Offsets] | None:
    """Decode the packets at the front that have zero pages of one block, and nothing else.

    :param name: of the block, 256 bytes as they stand in the packets.
    :param flags: those that such a packet may have.
    :return: how many bytes they are, and the offsets, which are not checked; None: there are not two.
    """
    count = min(len(raw), MOST_BYTES) // PACKET_BYTES
    if count < 2:
        return None
    headers: npt.NDArray[np.void] = np.frombuffer(raw, HEADER, count)
    zeros = headers["zero"]
    fits = (headers["magic"] == MAGIC) & (headers["version"] == VERSION)
    fits &= (headers["flags"] & ~np.uint32(flags)) == 0
    fits &= (headers["slots"] <= PACKET_PAGES) & (headers["normal"] == 0)
    fits &= (zeros > 0) & (zeros <= PACKET_PAGES) & (headers["block"] == np.void(name))
    count = int(fits.argmin()) if not fits.all() else count
    if count < 2:
        return None
    places = headers["offsets"][:count]
    offsets = places[zeros[:count, None] > _SLOTS].astype(np.uint64)
    return count * PACKET_BYTES, offsets
