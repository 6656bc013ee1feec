"""The messages of vhost-user, each declared once: number, payload, descriptors, answer.

The source is QEMU's ``docs/interop/vhost-user.rst``.  A message is a header of three u32 (number, flags,
bytes of payload) and its payload, in the byte order of the host; descriptors come with its first byte.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, Final

from postcopy.vhost_user.payloads import (
    Config,
    Log,
    MemoryTable,
    Number,
    Payload,
    RingAddresses,
    RingDescriptor,
    RingState,
    SingleRegion,
)

MOST_DESCRIPTORS: Final = 8
"""With one message: the regions of a memory table."""

FEATURE_LOG_ALL: Final = 1 << 26
"""The virtio feature bit by which a front end switches the dirty log on."""

FEATURE_PROTOCOL_FEATURES: Final = 1 << 30
"""The virtio feature bit by which a back end says that it has :class:`ProtocolFeature`."""


class ProtocolFeature(IntFlag):
    """What both ends can agree on beyond virtio's features."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


class Flag(IntFlag):
    """The flags of a header; the two lowest bits are the version, which is 1."""

    VERSION = 1
    REPLY = 4
    NEED_REPLY = 8


class Request(IntEnum):
    """What a front end sends."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class BackendRequest(IntEnum):
    """What a back end sends, over the channel that SET_BACKEND_REQ_FD gives it."""

    CONFIG_CHANGE_MSG = 2


Counts = Callable[[Any], tuple[int, int]]
"""The least and the most descriptors with a payload."""


def _exactly(count: int) -> Counts:
    return lambda _: (count, count)


_NO_DESCRIPTOR: Final = _exactly(0)
_NO_FEATURE: Final = ProtocolFeature(0)


def _as_payload_says(payload: MemoryTable | RingDescriptor) -> tuple[int, int]:
    return payload.descriptors, payload.descriptors


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of message.

    :ivar payload: what it carries; None: nothing.
    :ivar descriptors: how many come with it.
    :ivar answer: the payload of its answer; None: it has none but an acknowledgement, if that is asked for.
    :ivar answer_descriptors: how many come with the answer.
    :ivar answer_may_be_empty: DPDK leaves the payload out.
    :ivar is_acknowledged: in postcopy an answer has its own answer: :class:`Number`, under the same number.
    :ivar needs: what must have been agreed on before.
    """

    number: Request | BackendRequest
    payload: type[Payload] | None = None
    descriptors: Counts = _NO_DESCRIPTOR
    answer: type[Payload] | None = None
    answer_descriptors: int = 0
    answer_may_be_empty: bool = False
    is_acknowledged: bool = False
    needs: ProtocolFeature = _NO_FEATURE

    @property
    def name(self) -> str:
        """As in the specification, without ``VHOST_USER_``."""
        return self.number.name

    @property
    def has_answer(self) -> bool:
        """Whether it is answered in any case."""
        return self.answer is not None or self.answer_descriptors > 0


_R, _P = Request, ProtocolFeature

FRONT_END: Final[Mapping[int, Kind]] = {
    kind.number: kind
    for kind in (
        Kind(_R.GET_FEATURES, answer=Number),
        Kind(_R.SET_FEATURES, Number),
        Kind(_R.SET_OWNER),
        Kind(_R.RESET_OWNER),
        Kind(_R.SET_MEM_TABLE, MemoryTable, _as_payload_says, is_acknowledged=True),
        Kind(
            _R.SET_LOG_BASE,
            Log,
            _exactly(1),
            Number,
            answer_may_be_empty=True,
            needs=_P.LOG_SHMFD,
        ),
        Kind(_R.SET_LOG_FD, None, _exactly(1)),
        Kind(_R.SET_VRING_NUM, RingState),
        Kind(_R.SET_VRING_ADDR, RingAddresses),
        Kind(_R.SET_VRING_BASE, RingState),
        Kind(_R.GET_VRING_BASE, RingState, answer=RingState),
        Kind(_R.SET_VRING_KICK, RingDescriptor, _as_payload_says),
        Kind(_R.SET_VRING_CALL, RingDescriptor, _as_payload_says),
        Kind(_R.SET_VRING_ERR, RingDescriptor, _as_payload_says),
        Kind(_R.GET_PROTOCOL_FEATURES, answer=Number),
        Kind(_R.SET_PROTOCOL_FEATURES, Number),
        Kind(_R.GET_QUEUE_NUM, answer=Number, needs=_P.MQ),
        Kind(_R.SET_VRING_ENABLE, RingState),
        Kind(_R.SET_BACKEND_REQ_FD, None, _exactly(1), needs=_P.BACKEND_REQ),
        Kind(_R.GET_CONFIG, Config, answer=Config, needs=_P.CONFIG),
        Kind(_R.SET_CONFIG, Config, needs=_P.CONFIG),
        Kind(_R.POSTCOPY_ADVISE, answer_descriptors=1, needs=_P.PAGEFAULT),
        Kind(_R.POSTCOPY_LISTEN, needs=_P.PAGEFAULT),
        Kind(_R.POSTCOPY_END, answer=Number, needs=_P.PAGEFAULT),
        Kind(_R.GET_MAX_MEM_SLOTS, answer=Number, needs=_P.CONFIGURE_MEM_SLOTS),
        Kind(
            _R.ADD_MEM_REG,
            SingleRegion,
            _exactly(1),
            is_acknowledged=True,
            needs=_P.CONFIGURE_MEM_SLOTS,
        ),
        # QEMU sends the region's descriptor along, others none.
        Kind(_R.REM_MEM_REG, SingleRegion, lambda _: (0, 1), needs=_P.CONFIGURE_MEM_SLOTS),
    )
}
"""What a back end takes, by number; what is not here is refused by name."""

BACK_END: Final[Mapping[int, Kind]] = {
    kind.number: kind
    for kind in (Kind(BackendRequest.CONFIG_CHANGE_MSG, needs=_P.BACKEND_REQ | _P.CONFIG),)
}
"""What a front end takes."""


def name_of(number: int) -> str:
    """A front end's message by the specification's name, or its number where there is none."""
    try:
        return Request(number).name
    except ValueError:
        return f"message {number}"
