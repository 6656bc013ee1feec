"""A split virtqueue in ordinary memory, with the driver's side written out here."""

import struct

from postcopy.virtio.ring import RingLayout, SplitQueue

NEXT, WRITE, INDIRECT = 1, 2, 4
BODIES = 0x1000
"""Where indirect tables are."""


class Bytes:
    """An area of guest memory."""

    def __init__(self, size):
        self.data = bytearray(size)

    def read(self, offset, length_bytes):
        return bytes(self.data[offset : offset + length_bytes])

    def write(self, offset, data):
        self.data[offset : offset + len(data)] = data

    def load(self, offset):
        return int.from_bytes(self.data[offset : offset + 2], "little")

    def store(self, offset, value):
        self.data[offset : offset + 2] = value.to_bytes(2, "little")


class Driver:
    """Makes chains available, and sees what comes back."""

    def __init__(self, size=8, *, indirect=False, start=0):
        layout = RingLayout(size)
        self.size = size
        self.descriptors = Bytes(layout.descriptors_bytes)
        self.available = Bytes(layout.available_bytes)
        self.used = Bytes(layout.used_bytes)
        self.memory = Bytes(0x10000)
        self.available.write(2, struct.pack("<H", start))
        self.used.write(2, struct.pack("<H", start))
        self.index = start
        read = self.memory.read if indirect else None
        areas = (self.descriptors, self.available, self.used)
        self.queue = SplitQueue(size, *areas, next_available=start, read_memory=read)

    def describe(self, number, address, length, flags=0, following=0):
        entry = struct.pack("<QIHH", address, length, flags, following)
        self.descriptors.write(16 * number, entry)

    def offer(self, head):
        self.available.write(4 + 2 * (self.index % self.size), struct.pack("<H", head))
        self.index = (self.index + 1) & 0xFFFF
        self.available.write(2, struct.pack("<H", self.index))

    def used_entries(self):
        """All elements of the used ring, and its index."""
        elements = struct.iter_unpack("<II", bytes(self.used.data[4 : 4 + 8 * self.size]))
        return list(elements), struct.unpack("<H", self.used.read(2, 2))[0]
