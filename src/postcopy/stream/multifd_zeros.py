"""Packets of multifd that say of pages that they are zero, many at once.

A guest that has used a part of its memory has mostly such packets, and to decode one by itself takes as
long as to receive half a MiB of pages.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.stream.multifd_header import HEADER, MAGIC, PACKET_BYTES, PACKET_PAGES, VERSION
from postcopy.stream.records import Offsets

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
