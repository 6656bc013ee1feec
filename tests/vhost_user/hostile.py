"""Front ends that send what cannot be, by a seed: right messages up to a point, and then wrong ones."""

import contextlib
import gc
import os
import random
import socket
import struct
from pathlib import Path

from fakes import vhost_front_end as wire
from fakes.vhost_front_end import Ram, Ring
from postcopy.errors import VhostUserError
from postcopy.vhost_user.device import BlockDevice
from postcopy.vhost_user.session import Session
from postcopy.virtio.disk import Disk

_POWERS = (3, 6, 8, 12, 16, 20, 31, 32, 47, 63, 64)
EDGES = (
    0,
    2,
    9,
    *(1 << n for n in _POWERS[:-1]),
    *((1 << n) - 1 for n in _POWERS),
    (1 << 64) - 4096,
)
_U32 = (1 << 32) - 1


class Hostile:
    """Sessions in this process, one after another, with one device.

    :ivar messages: how many have been sent; about a third of them were changed.
    :ivar refused: how many sessions ended with a refusal.
    :ivar said: the words of the refusals.
    """

    def __init__(self, device, seed):
        self._random = random.Random(seed)
        self._device = device
        self._ram = Ram(1 << 18, parts=2)
        self._ring = Ring(self._ram, size=8, at=0x4000)
        self._null = os.open(os.devnull, os.O_RDWR)
        self._ours = [self._ram.fd, self._ring.kick, self._ring.call, self._null]
        self.messages = self.refused = 0
        self.said = set()

    def one(self):
        """One session; a refusal is the only way for it to fail."""
        right = self._rings() if self._random.random() < 0.7 else self._postcopy()
        kept = right[: self._random.randint(0, len(right))]
        rest = [self._wrong(message) for message in self._random.choices(right, k=3)]
        sent = kept + rest
        self._scribble()
        os.eventfd_write(self._ring.kick, 1)
        theirs, ours = socket.socketpair()
        with theirs:
            for data, fds in sent:
                socket.send_fds(theirs, [data], fds)
            theirs.shutdown(socket.SHUT_WR)
            self.messages += len(sent)
            with Session(ours, self._device, self._hear) as session:
                try:
                    session.run()
                except VhostUserError as error:
                    self.refused += 1
                    self.said.add(str(error))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._ring.kick)

    def close(self):
        os.close(self._null)
        self._ring.close()
        self._ram.close()

    def _hear(self, text):
        self.said.add(text)

    def _rings(self):
        user, ring = self._ram.user, self._ring
        places = (user + ring.descriptors, user + ring.used, user + ring.available, ring.used)
        eventfd = struct.pack("=Q", 0)
        return [
            *self._agreement(),
            self._message(wire.SET_MEM_TABLE, self._ram.table(), self._ram.fds()),
            self._message(wire.SET_LOG_BASE, struct.pack("=QQ", 4096, 0), [self._ram.fd]),
            self._message(wire.SET_VRING_NUM, struct.pack("=II", 0, ring.size)),
            self._message(wire.SET_VRING_BASE, struct.pack("=II", 0, 0)),
            self._message(wire.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 1, *places)),
            self._message(wire.SET_VRING_CALL, eventfd, [ring.call]),
            self._message(wire.SET_VRING_ERR, eventfd, [ring.error]),
            self._message(wire.SET_VRING_KICK, eventfd, [ring.kick]),
            self._message(wire.SET_VRING_ENABLE, struct.pack("=II", 0, 1)),
            self._message(wire.GET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(8)),
            self._message(wire.REM_MEM_REG, struct.pack("=Q", 0) + self._ram.table()[8:40]),
            self._message(wire.GET_VRING_BASE, struct.pack("=II", 0, 0)),
        ]

    def _postcopy(self):
        # No ring is ever kicked here: its pages would be waited for.
        return [
            *self._agreement(),
            self._message(wire.POSTCOPY_ADVISE),
            self._message(wire.POSTCOPY_LISTEN),
            self._message(wire.SET_MEM_TABLE, self._ram.table(), self._ram.fds()),
            self._message(wire.SET_MEM_TABLE, struct.pack("=Q", 0)),
            self._message(wire.SET_VRING_NUM, struct.pack("=II", 0, 8)),
            self._message(wire.GET_MAX_MEM_SLOTS),
            self._message(wire.POSTCOPY_END),
        ]

    def _agreement(self):
        features = wire.VERSION_1 | wire.PROTOCOL_FEATURES | wire.LOG_ALL | wire.INDIRECT
        return [
            self._message(wire.GET_FEATURES),
            self._message(wire.GET_PROTOCOL_FEATURES),
            self._message(wire.SET_PROTOCOL_FEATURES, struct.pack("=Q", 0x832B)),
            self._message(wire.SET_FEATURES, struct.pack("=Q", features)),
        ]

    def _message(self, number, payload=b"", fds=()):
        flags = self._random.choice((1, 9))
        return struct.pack("=III", number, flags, len(payload)) + payload, list(fds)

    def _wrong(self, message):
        """The same with something changed; it may still be right."""
        data, fds = bytearray(message[0]), list(message[1])
        draw = self._random.random
        for _ in range(self._random.randint(1, 2)):
            way = draw()
            if way < 0.35 and len(data) > 12:
                self._change_word(data, 12)
            elif way < 0.5:
                self._change_word(data, 0)
            elif way < 0.6:
                data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
            elif way < 0.7:
                cut = self._random.randrange(len(data))
                data = data[:cut] + self._random.randbytes(self._random.randint(1, 40))
            elif way < 0.9:
                count = self._random.choice((0, 1, 2, 7, 8, 9, 20))
                fds = self._random.choices(self._ours, k=count)
            else:
                data[:4] = struct.pack("=I", self._random.randrange(48))
        return bytes(data), fds

    def _change_word(self, data, first):
        size = 4 if first == 0 else self._random.choice((4, 8))
        places = range(first, min(len(data), 300) - size + 1, 4)
        if places:
            at = self._random.choice(places)
            value = self._random.choice(EDGES) & (_U32 if size == 4 else ~0)
            data[at : at + size] = value.to_bytes(size, "little")

    def _scribble(self):
        """Put into the ring what no driver would."""
        ring, memory = self._ring, self._ram.bytes
        for number in range(ring.size):
            address = self._random.choice((*EDGES, 0x8000, 0x9000, 0x1FF00))
            length = self._random.choice((0, 1, 16, 512, 513, 4096, _U32))
            flags, following = self._random.randrange(8), self._random.randrange(10)
            entry = struct.pack("<QIHH", address, length, flags, following)
            memory[ring.descriptors + 16 * number : ring.descriptors + 16 * number + 16] = entry
        index = self._random.choice((0, 1, 3, 8, 9, 0xFFFF))
        heads = [self._random.randrange(10) for _ in range(ring.size)]
        available = struct.pack(f"<HH{ring.size}H", 0, index, *heads)
        memory[ring.available : ring.available + len(available)] = available
        memory[0x8000:0x8010] = struct.pack("<IIQ", self._random.randrange(3), 0, 0)


def flood(disk, seed, count):
    """Send so many messages to back ends of a disk; none may leave a descriptor or a mapping behind."""
    with contextlib.closing(Disk(disk)) as opened:
        hostile = Hostile(BlockDevice(opened), seed)
        with contextlib.closing(hostile):
            hostile.one()
            gc.collect()
            before = open_files(), mappings()
            while hostile.messages < count:
                hostile.one()
            # Fewer than before: what an earlier test of this process had left has gone meanwhile.
            assert open_files() <= before[0]
            assert mappings() <= before[1]
    return hostile


def open_files():
    """How many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def mappings():
    """How many ranges of guest memory this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:")
