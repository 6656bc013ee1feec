"""A vhost-user front end of the tests' own: its bytes, guest memory, a ring and a block driver.

Nothing here is the package's: what both sides have wrong in common would not be seen.
"""

import array
import ctypes
import itertools
import mmap
import os
import select
import socket
import struct
from pathlib import Path

from fakes.waiting import wait_until

TIMEOUT_S = 30.0
PAGE = 4096

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE, SET_LOG_BASE = 1, 2, 3, 5, 6
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
SET_BACKEND_REQ_FD, GET_CONFIG, SET_CONFIG = 21, 24, 25
POSTCOPY_ADVISE, POSTCOPY_LISTEN, POSTCOPY_END = 28, 29, 30
GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG = 36, 37, 38

LOG_ALL, PROTOCOL_FEATURES, VERSION_1, INDIRECT = 1 << 26, 1 << 30, 1 << 32, 1 << 28
REPLY_ACK = 1 << 3

IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
NEXT, WRITE = 1, 2


class Closed(Exception):
    """The back end has closed the connection."""


class FrontEnd:
    """One connection; every message is acknowledged, once that has been agreed on."""

    def __init__(self, connected):
        self._socket = connected
        self._socket.settimeout(TIMEOUT_S)
        self._acknowledged = False

    @classmethod
    def connect(cls, path: Path):
        connected = socket.socket(socket.AF_UNIX)

        def connects():
            return connected.connect_ex(str(path)) == 0

        wait_until(connects, TIMEOUT_S, f"a back end at {path}")
        return cls(connected)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._socket.close()

    def closed(self):
        """Whether the back end has closed; only while no message is on its way."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def send(self, number, payload=b"", fds=(), *, flags=1):
        self.send_raw(struct.pack("=III", number, flags, len(payload)) + payload, fds)

    def send_raw(self, data, fds=()):
        try:
            sent = socket.send_fds(self._socket, [data], list(fds))
            if sent < len(data):
                self._socket.sendall(data[sent:])
        except ConnectionError as error:
            raise Closed from error

    def receive(self):
        """The next message: number, flags, payload, descriptors."""
        fds = array.array("i")
        number, flags, size = struct.unpack("=III", self._read(12, fds))
        return number, flags, self._read(size, fds), list(fds)

    def ask(self, number, payload=b"", fds=()):
        """The payload and the descriptors of its answer."""
        self.send(number, payload, fds)
        return self.answer_to(number)

    def answer_to(self, number):
        answered, flags, payload, fds = self.receive()
        assert (answered, flags) == (number, 5)
        return payload, fds

    def number(self, request, payload=b"", fds=()):
        """The u64 of its answer."""
        answer, fds = self.ask(request, payload, fds)
        assert not fds
        return struct.unpack("=Q", answer)[0]

    def do(self, number, payload=b"", fds=()):
        """Have it done, and wait for that if it can be."""
        if not self._acknowledged:
            self.send(number, payload, fds)
            return 0
        self.send(number, payload, fds, flags=9)
        return struct.unpack("=Q", self.answer_to(number)[0])[0]

    def negotiate(self, features=~0, protocol=~0):
        """Agree on all that is offered, or on these."""
        self.offered = self.number(GET_FEATURES)
        self.protocol = self.number(GET_PROTOCOL_FEATURES) & protocol
        self.do(SET_PROTOCOL_FEATURES, struct.pack("=Q", self.protocol))
        self._acknowledged = bool(self.protocol & REPLY_ACK)
        self.do(SET_OWNER)
        self.set_features(self.offered & features & ~LOG_ALL)

    def set_features(self, features):
        self.features = features
        assert self.do(SET_FEATURES, struct.pack("=Q", features)) == 0

    def configuration(self, length, offset=0):
        answer, _ = self.ask(GET_CONFIG, struct.pack("=III", offset, length, 0) + bytes(length))
        return answer[12:]

    def set_memory(self, ram):
        assert self.do(SET_MEM_TABLE, ram.table(), ram.fds()) == 0

    def _read(self, size, fds):
        data = b""
        while len(data) < size:
            try:
                part, ancillary, _, _ = self._socket.recvmsg(size - len(data), 64)
            except ConnectionError as error:
                raise Closed from error
            for _, _, payload in ancillary:
                fds.frombytes(payload)
            if not part:
                raise Closed
            data += part
        return data


class Ram:
    """Guest memory: one memfd in regions, with gaps between them in the guest's addresses."""

    def __init__(self, size=4 << 20, *, parts=1, gap=0, flags=0, like=None):
        if like is not None:
            size, parts, gap, flags = like.size, *like.form
        self.size, self.form = size, (parts, gap, flags)
        self.fd = os.memfd_create("ram", os.MFD_CLOEXEC | flags)
        os.ftruncate(self.fd, size)
        self.bytes = mmap.mmap(self.fd, size)
        part = size // parts
        self.user = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        self.regions = [
            (n * (part + gap), part, self.user + n * part, n * part) for n in range(parts)
        ]

    def table(self):
        count = struct.pack("=II", len(self.regions), 0)
        return count + b"".join(struct.pack("=QQQQ", *region) for region in self.regions)

    def fds(self):
        return [self.fd] * len(self.regions)

    def guest(self, offset):
        """The guest address of an offset."""
        for address, size, _, start in self.regions:
            if start <= offset < start + size:
                return address + offset - start
        raise ValueError(offset)

    def close(self):
        os.close(self.fd)


class Ring:
    """The driver's side of a split ring, at fixed offsets of the memory."""

    def __init__(self, ram, *, at=0x10000, size=64):
        self.ram, self.size = ram, size
        self.descriptors, self.available, self.used = at, at + 0x1000, at + 0x2000
        self.kick, self.call, self.error = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
        self.index = self.seen = 0
        self._next = 0

    def set_up(self, front_end, *, number=0, base=0, log=None, enable=True):
        state = struct.Struct("=II")
        user = self.ram.user
        places = (user + self.descriptors, user + self.used, user + self.available, log or 0)
        flags = 0 if log is None else 1
        assert front_end.do(SET_VRING_NUM, state.pack(number, self.size)) == 0
        assert front_end.do(SET_VRING_BASE, state.pack(number, base)) == 0
        assert front_end.do(SET_VRING_ADDR, struct.pack("=IIQQQQ", number, flags, *places)) == 0
        for request, fd in (
            (SET_VRING_CALL, self.call),
            (SET_VRING_ERR, self.error),
            (SET_VRING_KICK, self.kick),
        ):
            assert front_end.do(request, struct.pack("=Q", number), [fd]) == 0
        if enable:
            assert front_end.do(SET_VRING_ENABLE, state.pack(number, 1)) == 0

    def put(self, *chain):
        """Make a chain of (offset or guest address, length, flags) available; return its head."""
        head, memory = self._next, self.ram.bytes
        for position, (address, length, flags) in enumerate(chain):
            number = (head + position) % self.size
            more = position + 1 < len(chain)
            following = (number + 1) % self.size if more else 0
            entry = struct.pack("<QIHH", address, length, flags | (NEXT if more else 0), following)
            memory[self.descriptors + 16 * number : self.descriptors + 16 * number + 16] = entry
        self._next = (head + len(chain)) % self.size
        self.offer(head)
        return head

    def offer(self, head):
        at = self.available + 4 + 2 * (self.index % self.size)
        self.ram.bytes[at : at + 2] = struct.pack("<H", head)
        self.index = (self.index + 1) & 0xFFFF
        self.ram.bytes[self.available + 2 : self.available + 4] = struct.pack("<H", self.index)

    def notify(self):
        os.eventfd_write(self.kick, 1)

    def used_index(self):
        return struct.unpack_from("<H", self.ram.bytes, self.used + 2)[0]

    def wait(self):
        """The next element of the used ring: head and count."""
        while self.used_index() == self.seen:
            assert select.select([self.call], [], [], TIMEOUT_S)[0], "no interrupt came"
            os.eventfd_read(self.call)
        element = struct.unpack_from(
            "<II", self.ram.bytes, self.used + 4 + 8 * (self.seen % self.size)
        )
        self.seen = (self.seen + 1) & 0xFFFF
        return element

    def close(self):
        for fd in (self.kick, self.call, self.error):
            os.close(fd)


class BlockDriver:
    """Block requests, each with a header, data and status of its own."""

    HEADERS, STATUSES, DATA = 0x20000, 0x30000, 0x100000

    def __init__(self, ring):
        self.ring, self.ram = ring, ring.ram
        self._slots = itertools.count()

    def submit(self, kind, sector=0, data=None, length=0, *, kick=True):
        """Put a request into the ring; return its slot."""
        slot = next(self._slots) % (self.ring.size // 4)
        memory, guest = self.ram.bytes, self.ram.guest
        header, status = self.HEADERS + 16 * slot, self.STATUSES + slot
        place = self.data_at(slot)
        memory[header : header + 16] = struct.pack("<IIQ", kind, 0, sector)
        memory[status] = 0xFF
        chain = [(guest(header), 16, 0)]
        if data is not None:
            memory[place : place + len(data)] = data
            chain.append((guest(place), len(data), 0))
        if length:
            chain.append((guest(place), length, WRITE))
        self.ring.put(*chain, (guest(status), 1, WRITE))
        if kick:
            self.ring.notify()
        return slot

    def data_at(self, slot):
        return self.DATA + slot * 0x10000

    def status(self, slot):
        return self.ram.bytes[self.STATUSES + slot]

    def read(self, sector, length):
        slot = self.submit(IN, sector, length=length)
        assert self.ring.wait()[1] == length + 1
        assert self.status(slot) == 0
        return self.ram.bytes[self.data_at(slot) : self.data_at(slot) + length]

    def write(self, sector, data):
        slot = self.submit(OUT, sector, data)
        self.ring.wait()
        return self.status(slot)

    def flush(self):
        slot = self.submit(FLUSH)
        self.ring.wait()
        return self.status(slot)
