"""A relay that does harm at an exact place: at a named record, or at a byte.

::

    with FaultChannel("tcp:127.0.0.1:0", target) as channel:
        fault = channel.cut(RUN)                     # behind the record
        fault = channel.cut(RECV_BITMAP, at=1)       # behind its first byte
        fault = channel.stall(70_000, Way.DOWN)      # a place in bytes
        channel.black_hole(RESUME); channel.corrupt(PACKAGE, at=2)
        fault.wait()                                 # until it has happened

A fault happens once, on the first connection that comes to its place (or on the one whose number is
given).  ``hold`` and ``release`` reorder two connections.  ``stall`` lasts until ``flow``; what falls
into a black hole is gone, the end of a peer too, while the other finds its socket open.  ``delay`` and
``break_all`` are the relay's own.
"""

import struct
import threading
from dataclasses import dataclass, field

from faults.relay import Relay, Way
from postcopy.stream.pings import ALL_SENT_PING, answer

DEADLINE_S = 30.0


@dataclass(frozen=True)
class NamedRecord:
    """A record of the stream, or a message of the return path, found by how it begins."""

    name: str
    begin: bytes
    way: Way = Way.UP

    def __str__(self):
        return self.name


def _command(name, number, length, more=b""):
    return NamedRecord(name, struct.pack(">BHH", 8, number, length) + more)


def _answer(name, number, payload):
    begin = struct.pack(">HH", number, len(payload)) + payload
    return NamedRecord(name, begin, Way.DOWN)


RAM_NAME = b"microvm.ram"
DISCARD = NamedRecord("discard", struct.pack(">BH", 8, 6))
PACKAGE = _command("package", 7, 4)
LISTEN = _command("listen", 4, 0)
AFTER_PACKAGE = _command("after-package", 2, 4, struct.pack(">I", 4))
PACKAGE_PING = _command("package-ping", 2, 4, struct.pack(">I", 3))
RUN = _command("run", 5, 0)
LAST_PING = _command("last-ping", 2, 4, struct.pack(">I", 5))
ALL_SENT = _command("all-sent", 2, 4, struct.pack(">I", ALL_SENT_PING))
RECV_BITMAP = _command("recv-bitmap", 10, len(RAM_NAME) + 1)
RESUME = _command("resume", 9, 0)
END_OF_RAM = NamedRecord("end-of-ram", struct.pack(">BI", 3, 2))

PACKAGE_PONG = _answer("package-pong", 2, struct.pack(">I", 3))
LAST_PONG = _answer("last-pong", 2, struct.pack(">I", 5))
NOTHING_MISSING = _answer("nothing-missing", 2, struct.pack(">I", answer(ALL_SENT_PING)))
BITMAP = _answer("bitmap", 5, bytes([len(RAM_NAME)]) + RAM_NAME)
RESUME_ACK = _answer("resume-ack", 6, struct.pack(">I", 1))
SHUT = _answer("shut", 1, struct.pack(">I", 0))

RECOVERY = (RECV_BITMAP, BITMAP, RESUME, RESUME_ACK)
"""The steps of a recovery, in order."""


@dataclass
class Fault:
    """One fault that is to happen; :meth:`wait` until it has."""

    kind: str
    way: Way
    record: NamedRecord | None
    at: int | None
    connection: int | None
    data: bytes = b""
    happened: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout_s=DEADLINE_S):
        assert self.happened.wait(timeout_s), f"no {self.kind} at {self.record or self.at}"

    def place(self, so_far, chunk):
        """The byte of this way's stream behind which it happens, if the chunk tells."""
        if self.record is None:
            return self.at
        begin = self.record.begin
        tail = bytes(so_far[-len(begin) + 1 :])
        found = (tail + chunk).find(begin)
        if found < 0:
            return None
        at = len(begin) if self.at is None else self.at
        return len(so_far) - len(tail) + found + at


class FaultChannel(Relay):
    """A relay with faults; those that are armed wait for their place."""

    def __init__(self, listen, target):
        self._faults = []
        self._places = {}  # of a fault, on a connection, once it is known
        self._swallowed = set()
        self._held = {}  # number and way of a connection to what lets it go
        super().__init__(listen, target)

    def cut(self, where, way=Way.UP, *, at=None, connection=None):
        """Break the connection.

        :param where: a :class:`NamedRecord`, or so many bytes of ``way``.
        :param at: bytes of the record that still pass; all of its beginning if None.
        """
        return self._arm("cut", where, way, at, connection)

    def stall(self, where, way=Way.UP, *, at=None, connection=None):
        """Hold back every byte, both ways, until ``flow``."""
        return self._arm("stall", where, way, at, connection)

    def black_hole(self, where, way=Way.UP, *, at=None, connection=None):
        """Swallow every byte from there on, both ways."""
        return self._arm("black hole", where, way, at, connection)

    def corrupt(self, where, way=Way.UP, *, at=0, connection=None):
        """Turn all bits of the byte at the place."""
        return self._arm("corruption", where, way, at, connection)

    def inject(self, where, data, way=Way.UP, *, at=None, connection=None):
        """Say something that the peer has not said."""
        return self._arm("injection", where, way, at, connection, data)

    def hold(self, connection, way=Way.UP):
        """Hold one way of one connection back, so that the others overtake it, until ``release``."""
        with self._lock:
            self._held.setdefault((connection, way), threading.Event())

    def release(self, connection, way=Way.UP):
        """Let pass what was held back."""
        with self._lock:
            self._held.pop((connection, way)).set()

    def close(self):
        """See :meth:`Relay.close`; what is held back is lost."""
        self.break_all()
        with self._lock:
            for held in self._held.values():
                held.set()
        super().close()

    def _hold_back(self, number, way):
        super()._hold_back(number, way)
        with self._lock:
            held = self._held.get((number, way))
        if held is not None:
            held.wait()

    def _arm(self, kind, where, way, at, connection, data=b""):
        if isinstance(where, NamedRecord):
            fault = Fault(kind, where.way, where, at, connection, data)
        else:
            fault = Fault(kind, way, None, where, connection, data)
        with self._lock:
            self._faults.append(fault)
        return fault

    def _treat(self, connection, number, way, chunk):
        if connection in self._swallowed:
            return
        start = len(connection.recorded[way])
        due = self._due(connection, number, way, chunk)
        passed = 0
        for place, fault in due:
            here = max(0, place - start)
            if fault.kind == "corruption":
                chunk = chunk[:here] + bytes([chunk[here] ^ 0xFF]) + chunk[here + 1 :]
                fault.happened.set()
                continue
            yield chunk[passed:here]
            passed = here
            if fault.kind == "injection":
                yield fault.data
                fault.happened.set()
                continue
            if not self._happen(fault, connection):
                return
        yield from super()._treat(connection, number, way, chunk[passed:])

    def _passes_ends(self, connection):
        return connection not in self._swallowed

    def _happen(self, fault, connection):
        """Let it happen; return whether anything more is passed on."""
        if fault.kind == "cut":
            connection.close()
        elif fault.kind == "black hole":
            self._swallowed.add(connection)
        else:
            self.stall_now()
        fault.happened.set()
        if fault.kind == "stall":
            self._flowing.wait()
            return not connection.cut.is_set()
        return False

    def stall_now(self):
        """Stall at once."""
        Relay.stall(self)

    def _due(self, connection, number, way, chunk):
        """The faults whose place is in this chunk, in order."""
        so_far = connection.recorded[way]
        end = len(so_far) + len(chunk)
        due = []
        with self._lock:
            for fault in self._faults:
                if fault.way is not way or fault.connection not in {None, number}:
                    continue
                key = id(fault), number
                place = self._places.get(key)
                if place is None:
                    place = fault.place(so_far, chunk)
                    if place is None:
                        continue
                    self._places[key] = place
                reached = place < end if fault.kind == "corruption" else place <= end
                if reached:
                    due.append((place, fault))
            for _, fault in due:
                self._faults.remove(fault)
        return sorted(due, key=lambda item: item[0])
