"""The front end's messages to one back end: features, configuration, memory, rings, dirty log, postcopy.

One exchange after another; nothing here has a lock or decides when it is done
(:mod:`postcopy.vhost_user.back_end_process`).  What the back end answers is not trusted: what cannot be is
a :class:`~postcopy.errors.VhostUserError`, and the connection is of no use any more.  The source is QEMU's
``docs/interop/vhost-user.rst``.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from postcopy.errors import CannotConnect, VhostUserError
from postcopy.vhost_user.connection import Connection
from postcopy.vhost_user.messages import (
    FEATURE_LOG_ALL,
    FEATURE_PROTOCOL_FEATURES,
    FRONT_END,
    Kind,
    ProtocolFeature,
    Request,
)
from postcopy.vhost_user.payloads import (
    MOST_REGIONS,
    Config,
    Log,
    MemoryTable,
    Number,
    Payload,
    Region,
    RingAddresses,
    RingDescriptor,
    RingState,
)
from postcopy.virtio.ring import Feature

_REQUIRED: Final = int(Feature.VERSION_1) | FEATURE_PROTOCOL_FEATURES
_PROTOCOL: Final = (
    ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.PAGEFAULT
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RARP
)
"""Not CONFIGURE_MEM_SLOTS: with it libvhost-user cannot do postcopy (its ADD_MEM_REG fails there)."""

MOST_PARTS: Final = MOST_REGIONS


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """A part of a RAM block, in one piece among the guest's physical addresses.

    :ivar offset: where it begins in the block.
    :ivar fd: of the block's file; ``file_offset``: where the part begins there.
    """

    block: str
    offset: int
    size_bytes: int
    guest_address: int
    fd: int
    file_offset: int

    @property
    def region(self) -> Region:
        """As the table of memory has it.

        The front end's own addresses are the guest's: a ring's need not be translated, and they cannot be
        taken for addresses of the back end.
        """
        return Region(self.guest_address, self.size_bytes, self.guest_address, self.file_offset)


@dataclass(frozen=True, slots=True)
class Ring:
    """Where the driver has put a ring, by guest-physical addresses.

    :ivar base: index of the next request.
    :ivar kick: eventfd by which the driver tells of requests; ``call``: by which it is told.
    """

    number: int
    entries: int
    descriptors: int
    available: int
    used: int
    base: int
    kick: int
    call: int


class FrontEnd:
    """One connection; one thread at a time.

    :ivar features: the virtio features that the back end offers; ``protocol``: what is agreed on;
        ``offered``: what it offers of that.
    :ivar connection: for waits on it.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.connection = Connection(connected, FRONT_END)
        self.features = 0
        self.protocol = self.offered = ProtocolFeature(0)

    @classmethod
    def connect(cls, path: str, timeout_s: float) -> "FrontEnd":
        """Connect to a back end that listens, and agree on what the protocol can.

        :param timeout_s: for all of it.
        :raises CannotConnect: it does not listen.
        :raises VhostUserError: it lacks a feature, or answers what cannot be.
        :raises TimeoutError: it does not answer; it may have another front end.
        """
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(timeout_s)
            connected.connect(path)
        except OSError as error:
            connected.close()
            raise CannotConnect(
                f"no vhost-user back end at {path}: {error.strerror or error}; start one that listens "
                "there"
            ) from error
        front_end = cls(connected)
        try:
            front_end.connection.bound(timeout_s)
            front_end._negotiate()
        except BaseException:
            front_end.close()
            raise
        return front_end

    @property
    def process_id(self) -> int:
        """The process that answers, as the kernel says; 0: it is in another PID namespace.

        Not that of ``SO_PEERCRED``, which may have forked the one that answers.
        """
        return self.connection.process_id

    def _negotiate(self) -> None:
        self.features = self._ask_number(Request.GET_FEATURES)
        if lacking := _REQUIRED & ~self.features:
            raise VhostUserError(f"GET_FEATURES: {lacking:#x} are required, and not offered", 12)
        self.offered = ProtocolFeature(self._ask_number(Request.GET_PROTOCOL_FEATURES))
        wanted = _PROTOCOL & self.offered
        self._send(Request.SET_PROTOCOL_FEATURES, Number(int(wanted)))
        self.protocol = wanted
        self.do(Request.SET_OWNER)

    def configuration(self, length_bytes: int) -> bytes:
        """The beginning of the device's configuration space.

        :raises VhostUserError: the back end has less, or none.
        """
        if ProtocolFeature.CONFIG not in self.protocol:
            raise VhostUserError("GET_PROTOCOL_FEATURES: CONFIG is required, and not offered", 12)
        kind = FRONT_END[Request.GET_CONFIG]
        answer = self._ask(kind.number, Config(0, 0, bytes(length_bytes)))
        if len(answer.data) != length_bytes or answer.offset:
            raise VhostUserError(
                f"GET_CONFIG: {len(answer.data)} bytes of configuration from {answer.offset} on, and "
                f"{length_bytes} from 0 on were asked for",
                12,
            )
        data: bytes = answer.data
        return data

    def announce(self, address: bytes) -> None:
        """Have it tell its network where the guest with this address is; it does not say when it has.

        :param address: six bytes.
        """
        number = Number(int.from_bytes(address, "little"))
        self.connection.send(Kind(Request.SEND_RARP, Number, needs=ProtocolFeature.RARP), number)

    # Memory

    def set_memory(self, parts: Sequence[MemoryPart]) -> None:
        """Have it map the guest's memory."""
        self.do(Request.SET_MEM_TABLE, _table(parts), [part.fd for part in parts])

    def advise(self) -> int:
        """Begin with postcopy; return the descriptor of the back end's userfaultfd, the caller's."""
        kind = FRONT_END[Request.POSTCOPY_ADVISE]
        self.connection.send(kind)
        with self.connection.receive_answer(kind) as answer:
            return answer.take_descriptor()

    def listen(self, parts: Sequence[MemoryPart]) -> None:
        """Have it map the guest's memory, and register that with its userfaultfd.

        The addresses in its answer are not looked at: libvhost-user sends our own back.

        :raises VhostUserError: it answers with other memory.
        """
        self.do(Request.POSTCOPY_LISTEN)
        kind, table = FRONT_END[Request.SET_MEM_TABLE], _table(parts)
        # An acknowledgement must not be asked for: libvhost-user would send it behind ours.
        self.connection.send(kind, table, [part.fd for part in parts])
        with self.connection.receive_answer(kind, MemoryTable) as answer:
            found: Any = answer.payload
        if _without_addresses(found) != _without_addresses(table):
            raise VhostUserError("SET_MEM_TABLE: the answer has other regions than the message", 12)
        self.connection.send(kind, Number(0))
        # It registers its memory behind that.  On return this is done: a range that is unregistered again
        # at once would be registered afterwards, and nothing would serve its faults.
        self._ask_number(Request.GET_FEATURES)

    def end(self) -> None:
        """Every page is in place: it closes its userfaultfd.

        :raises VhostUserError: it says that this has failed.
        """
        if result := self._ask_number(Request.POSTCOPY_END):
            raise VhostUserError(f"POSTCOPY_END: it has failed ({result})", 12)

    # Rings

    def set_features(self, features: int, *, log: bool) -> None:
        """Switch on what the driver has agreed on.

        :param features: the virtio features.
        :param log: whether writes are marked in the dirty log.
        """
        features |= FEATURE_PROTOCOL_FEATURES | (FEATURE_LOG_ALL if log else 0)
        self.do(Request.SET_FEATURES, Number(features))

    def set_addresses(self, ring: Ring, *, log: bool) -> None:
        """Tell it where the ring is."""
        flags = RingAddresses.LOGGED if log else 0
        places = ring.descriptors, ring.used, ring.available, ring.used
        self.do(Request.SET_VRING_ADDR, RingAddresses(ring.number, flags, *places))

    def start_ring(self, ring: Ring, *, log: bool) -> None:
        """Have it do the requests of the ring."""
        number = ring.number
        self.do(Request.SET_VRING_NUM, RingState(number, ring.entries))
        self.do(Request.SET_VRING_BASE, RingState(number, ring.base))
        self.set_addresses(ring, log=log)
        self.do(Request.SET_VRING_CALL, RingDescriptor(number), [ring.call])
        self.do(Request.SET_VRING_KICK, RingDescriptor(number), [ring.kick])
        self.do(Request.SET_VRING_ENABLE, RingState(number, 1))

    def stop_ring(self, number: int) -> int:
        """Have it do no more requests of that ring; return the index of the next one."""
        answer = self._ask(Request.GET_VRING_BASE, RingState(number, 0))
        if answer.index != number or answer.value > 0xFFFF:
            raise VhostUserError(
                f"GET_VRING_BASE: ring {answer.index} at {answer.value:#x}, and ring {number} was asked "
                "for",
                12,
            )
        base: int = answer.value
        return base

    def set_log(self, fd: int, size_bytes: int) -> None:
        """Give it the dirty log, in place of the one before: a bit for each 4 KiB of guest addresses."""
        kind = FRONT_END[Request.SET_LOG_BASE]
        self.connection.send(kind, Log(size_bytes, 0), [fd])
        # QEMU's answer has the size in it, DPDK's nothing.
        with self.connection.receive_answer(kind):
            pass

    # Messages

    def do(self, number: Request, payload: Payload | None = None, fds: Sequence[int] = ()) -> None:
        """Have it do something, and wait until it is done, if it can tell.

        :raises VhostUserError: it says that it has failed.
        """
        kind = FRONT_END[number]
        acknowledged = ProtocolFeature.REPLY_ACK in self.protocol
        self.connection.send(kind, payload, fds, need_reply=acknowledged)
        if acknowledged:
            with self.connection.receive_answer(kind) as answer:
                result: Any = answer.payload
            if result.value:
                raise VhostUserError(f"{kind.name}: it has failed ({result.value:#x})", 12)

    def close(self) -> None:
        """Close the connection: the back end lets go of everything."""
        self.connection.close()

    def _send(self, number: Request, payload: Payload) -> None:
        self.connection.send(FRONT_END[number], payload)

    def _ask_number(self, number: Request) -> int:
        value: int = self._ask(number).value
        return value

    def _ask(self, number: int, payload: Payload | None = None) -> Any:
        kind = FRONT_END[number]
        self.connection.send(kind, payload)
        with self.connection.receive_answer(kind) as answer:
            return answer.payload


def _table(parts: Sequence[MemoryPart]) -> MemoryTable:
    return MemoryTable(tuple(part.region for part in parts))


def _without_addresses(table: MemoryTable) -> list[tuple[int, int, int]]:
    return [(each.guest_address, each.size, each.offset) for each in table.regions]
