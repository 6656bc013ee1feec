"""What a source writes on a channel of multifd, as QEMU 7.2 to 11.1 do."""

import struct
import zlib

import numpy as np
import zstandard

PAGE = 4096
SLOTS = 128
SYNC = 1
FLAGS = {"none": 0, "zlib": 2, "zstd": 4}


def initial(channel: int = 0, uuid: bytes = bytes(16)) -> bytes:
    return struct.pack(">II16sB39x", 0x11223344, 1, uuid, channel)


class ChannelWriter:
    """Writes the packets of one channel; its compressor goes on from packet to packet."""

    def __init__(self, compression: str = "none") -> None:
        self._flag = FLAGS[compression]
        self._zlib = zlib.compressobj(1) if compression == "zlib" else None
        self._zstd = zstandard.ZstdCompressor(1).compressobj() if compression == "zstd" else None
        self.number = 0

    def packet(self, block: str = "", pages=(), zeros=(), *, sync: bool = False) -> bytes:
        """Pages as ``(offset, rows)`` of which each row is a page; zeros as offsets."""
        offsets = [offset for offset, _ in pages]
        data = self._compressed(b"".join(bytes(row) for _, row in pages))
        flags = (SYNC if sync else 0) | (self._flag if pages else 0)
        header = struct.pack(
            ">IIIIIIQI28x256s", 0x11223344, 1, flags, 0 if sync else SLOTS, len(offsets), len(data),
            self.number, len(zeros), block.encode(),
        )  # fmt: skip
        self.number += 1
        places = np.zeros(SLOTS, ">u8")
        places[: len(offsets) + len(zeros)] = [*offsets, *zeros]
        return header + places.tobytes() + data

    def _compressed(self, data: bytes) -> bytes:
        if not data:
            return b""
        if self._zlib:
            return self._zlib.compress(data) + self._zlib.flush(zlib.Z_SYNC_FLUSH)
        if self._zstd:
            flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK
            return self._zstd.compress(data) + self._zstd.flush(flush)
        return data
