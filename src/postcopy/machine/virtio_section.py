"""The sections of devices on virtio-mmio, in QEMU's format.

Its length depends on the data: the configuration space is preceded by its length.  What the kind of device
has besides its queues follows, then subsections.  An array of 1024 queues is written whole; those that the
device has not are zeros.  A description has all of it as one field ``virtio``.  (QEMU's
``hw/virtio/virtio.c``, ``virtio_save``, and ``hw/net/virtio-net.c``.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from postcopy.errors import GuestError, StreamCut, StreamError
from postcopy.machine.virtio_state import (
    ADDRESS,
    BLK,
    DEFAULT_RING_ENTRIES,
    DEFAULT_VHOST_USER_ENTRIES,
    VHOST_USER_BLK,
    VIRTIO_NET,
    QueueRegisters,
    RingState,
    Status,
    VirtioState,
)
from postcopy.stream.vmstate import (
    BOOL,
    U8,
    U16,
    U32,
    U64,
    Field,
    Format,
    Kind,
    Structure,
    Values,
    buffer,
    pad,
)

_MOST_QUEUES: Final = 1024
_MOST_CONFIG_BYTES: Final = 4096
_ALIGNMENT: Final = 4096  # of a legacy ring; means nothing here
_EXTRA, _STATE = "virtio/extra_state", "virtio_mmio/state"
_FEATURES, _RINGS, _SIZES = "virtio/64bit_features", "virtio/virtqueues", "virtio/ringsize"
_BROKEN, _STARTED = "virtio/broken", "virtio/started"

_HEAD: Final = (
    *(Field(name, U32) for name in ("device_features_select", "driver_features_select")),
    Field("page_shift", U32),
    *(Field(name, U8) for name in ("status", "interrupt")),
    Field("queue_select", U16),
    Field("features_low", U32),
    Field("config_bytes", U32),
)
_HEAD_BYTES: Final = sum(each.size_bytes for each in _HEAD)
_COUNT_BYTES: Final = 4

_QUEUE: Final = Structure(
    "queue",
    (
        *(Field(name, U32) for name in ("entries", "alignment")),
        Field("descriptors", U64),
        Field("next_available", U16),
    ),
)
_RING_ADDRESSES: Final = Structure("ring", (Field("available", U64), Field("used", U64)))
_HALVES: Final = tuple(
    f"{name}_{half}" for name in ("descriptors", "available", "used") for half in ("low", "high")
)
_REGISTERS: Final = Structure(
    "virtio_mmio/queue_state",
    (Field("entries", U16), Field("ready", BOOL), *(Field(name, U32) for name in _HALVES)),
)


def _of_queues(kind: Structure | Kind, count: int) -> tuple[Field, ...]:
    size = kind.size_bytes * (_MOST_QUEUES - count)
    return (*(Field(f"queue{number}", kind) for number in range(count)), Field("unused", pad(size)))


def _subsections(queues: int) -> tuple[Format, ...]:
    registers = (Field("low", U32), Field("high", U32), *_of_queues(_REGISTERS, queues))
    return (
        Format("virtio/device_endian", 1, (Field("device_endian", U8),)),
        Format(_FEATURES, 1, (Field("features", U64),)),
        Format(_RINGS, 1, _of_queues(_RING_ADDRESSES, queues)),
        Format(_SIZES, 1, _of_queues(U32, queues)),
        Format(_BROKEN, 1, (Field("broken", BOOL),)),
        Format(_EXTRA, 1, (), (Format(_STATE, 1, registers),), prefix="virtio_mmio/"),
        Format(_STARTED, 1, (Field("started", BOOL),)),
        Format("virtio/disabled", 1, (Field("disabled", BOOL),)),
    )


_CONTROL_ENTRIES: Final = 64
_NET_FIELDS: Final = (
    Field("mac", buffer(6)),
    *(Field(name, U32) for name in ("tx_waiting", "mergeable_rx_bufs")),
    Field("link", U16),
    *(Field(name, U8) for name in ("promisc", "allmulti")),
    Field(
        "macs", U32
    ),  # those in the table, which would follow; only a control queue puts any there
    Field("vlans", buffer(512)),
    Field("has_vnet_hdr", U32),
    *(
        Field(name, U8)
        for name in (
            "multi_overflow",
            "uni_overflow",
            "alluni",
            "nomulti",
            "nouni",
            "nobcast",
            "has_ufo",
        )
    ),
)
_MACS_AT: Final = sum(each.size_bytes for each in _NET_FIELDS[:6])
_NET_VALUES: Final = {each.name: 0 for each in _NET_FIELDS} | {
    "link": 1,
    "promisc": 1,
    "vlans": b"\xff" * 512,
    "has_vnet_hdr": 1,
}
"""Of a device without a control queue, whose frames have a virtio header."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What differs from device to device.

    :ivar entries: how many each of QEMU's queues has unless told otherwise; ``queues``: how many we have.
    """

    version: int
    queues: int
    entries: tuple[int, ...]
    fields: tuple[Field, ...] = ()


_KINDS: Final = {
    BLK: _Kind(2, 1, (DEFAULT_RING_ENTRIES,), (Field("requests_follow", U8),)),
    VHOST_USER_BLK: _Kind(1, 1, (DEFAULT_VHOST_USER_ENTRIES,)),
    # The last is the control queue, which there is in QEMU also with ctrl_vq=off.
    VIRTIO_NET: _Kind(
        11, 2, (DEFAULT_RING_ENTRIES, DEFAULT_RING_ENTRIES, _CONTROL_ENTRIES), _NET_FIELDS
    ),
}


class VirtioFormat:
    """The format of one device, for a :class:`~postcopy.stream.format_table.FormatTable`.

    :param device: what QEMU calls it; the section of its own drive can have requests in flight.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._kind = _KINDS[device]
        self.name = f"virtio-mmio@{ADDRESS:016x}/{device}"
        self.version = self._kind.version

    def check_version(self, version: int) -> None:
        """See :meth:`postcopy.stream.vmstate.Format.check_version`."""
        self._format(0).check_version(version)

    def encode(self, values: Values) -> bytes:
        """See :meth:`postcopy.stream.vmstate.Format.encode`."""
        return self._format(len(values["config"])).encode(values)

    def decode(
        self, data: memoryview, *, version: int | None = None, whole: bool = False
    ) -> tuple[dict[str, Any], int] | None:
        """See :meth:`postcopy.stream.vmstate.Format.decode`.

        :raises StreamError: also for requests in flight, and for more queues than one.
        """
        found = self._config_bytes(data)
        if found is not None:
            return self._format(found).decode(data, version=version, whole=whole)
        if whole:
            raise StreamCut(f"{self.name}: {len(data)} bytes are too few")
        return None

    def describe(self, values: Values) -> dict[str, Any]:
        """See :meth:`postcopy.stream.vmstate.Format.describe`."""
        size = len(self.encode(values))
        field = {"name": "virtio", "type": "virtio", "size": size}
        return {"vmsd_name": self._device, "version": self.version, "fields": [field]}

    def _config_bytes(self, data: memoryview) -> int | None:
        """How long the configuration space is; None: more bytes are needed to tell what follows it."""
        if len(data) < _HEAD_BYTES:
            return None
        config = int.from_bytes(data[_HEAD_BYTES - 4 : _HEAD_BYTES], "big")
        if config > _MOST_CONFIG_BYTES:
            raise StreamError(f"{self.name}: a configuration space of {config} bytes is too long")
        at = _HEAD_BYTES + config
        wanted = len(self._kind.entries)
        own_at = at + _COUNT_BYTES + wanted * _QUEUE.size_bytes
        if len(data) < own_at + sum(each.size_bytes for each in self._kind.fields):
            return None
        queues = int.from_bytes(data[at : at + _COUNT_BYTES], "big")
        if queues != wanted:
            cure = "queues=1 of its netdev" if self._device == VIRTIO_NET else "num-queues=1"
            raise StreamError(
                f"{self.name}: it has {queues} queues, ours has {wanted}; give it {cure}"
            )
        self._check_own(data[own_at:])
        return config

    def _check_own(self, data: memoryview) -> None:
        """Refuse what cannot be here, of the fields that only this kind of device has."""
        if self._device == BLK and data[0]:
            raise StreamError(
                f"{self.name}: it has requests in flight, which only its own host can end; let the "
                "source's guest run (cont), and migrate again"
            )
        if self._device == VIRTIO_NET and any(data[_MACS_AT : _MACS_AT + 4]):
            raise StreamError(
                f"{self.name}: its driver has filled the table of addresses; give it ctrl_vq=off"
            )

    def _format(self, config_bytes: int) -> Format:
        return _format(self._device, self.name, config_bytes)


@lru_cache(8)
def _format(device: str, name: str, config_bytes: int) -> Format:
    kind = _KINDS[device]
    fields = (
        *_HEAD,
        Field("config", buffer(config_bytes)),
        Field("queues", U32),
        *(Field(f"queue{number}", _QUEUE) for number in range(len(kind.entries))),
        *kind.fields,
    )
    version, follow = kind.version, _subsections(len(kind.entries))
    return Format(name, version, fields, follow, minimum_version=version, prefix="virtio/")


FORMATS: Final = {device: VirtioFormat(device) for device in _KINDS}
"""By what QEMU calls the device.  The address in a section's name is the transport's, where QEMU's
``microvm`` has its first device."""

VIRTIO_BLK: Final = FORMATS[BLK]
NAME: Final = VIRTIO_BLK.name


def values_of(state: VirtioState) -> dict[str, Any]:
    """What the section says of a device that stands still: no request is in flight."""
    kind = _KINDS[state.section]
    none = len(kind.entries) - kind.queues
    rings = [*state.rings, *(RingState(entries) for entries in kind.entries[kind.queues :])]
    queues = [*state.queues, *none * [QueueRegisters()]]
    values: dict[str, Any] = {
        "device_features_select": state.device_features_select,
        "driver_features_select": state.driver_features_select,
        "page_shift": 0,
        "status": state.status,
        "interrupt": state.interrupt,
        "queue_select": state.queue_select,
        "features_low": state.features & 0xFFFFFFFF,
        "config_bytes": len(state.config),
        "config": state.config,
        "queues": len(rings),
        "requests_follow": 0,
        **_NET_VALUES,
        "mac": state.config[:6],
        **_numbered(_ring_values(ring) for ring in rings),
        _FEATURES: {"features": state.features},
        _RINGS: _numbered({"available": ring.available, "used": ring.used} for ring in rings),
        _EXTRA: {_STATE: _registers_of(state, queues)},
    }
    if any(ring.entries != entries for ring, entries in zip(rings, kind.entries, strict=True)):
        values[_SIZES] = _numbered(kind.entries)
    if state.broken:
        values[_BROKEN] = {"broken": True}
    if state.status & Status.DRIVER_OK:
        values[_STARTED] = {"started": True}
    return values


def state_of(values: Values, device: str = BLK) -> VirtioState:
    """What a section says.

    :param device: what QEMU calls the device.
    :raises GuestError: its transport is the legacy one.
    """
    if _EXTRA not in values or _STATE not in values[_EXTRA] or _RINGS not in values:
        raise GuestError(
            f"the guest's {device} is on the legacy virtio-mmio transport, ours on the modern one; start "
            "the source with -global virtio-mmio.force-legacy=off"
        )
    kind, registers = _KINDS[device], values[_EXTRA][_STATE]
    if any(
        values[f"queue{number}"]["descriptors"] for number in range(kind.queues, len(kind.entries))
    ):
        raise GuestError(
            f"the guest's {device} has a control queue, ours has none; give it ctrl_vq=off"
        )
    high = values.get(_FEATURES, {}).get("features", 0)
    return VirtioState(
        # A network's address is in its configuration only when the driver has looked for it.
        config=bytes(values["mac"] if device == VIRTIO_NET else values["config"]),
        device_features_select=values["device_features_select"],
        driver_features_select=values["driver_features_select"],
        queue_select=values["queue_select"],
        status=values["status"],
        interrupt=values["interrupt"],
        written_features=registers["low"] | registers["high"] << 32,
        features=high or values["features_low"],
        queues=tuple(
            _queue_registers(registers[f"queue{number}"]) for number in range(kind.queues)
        ),
        rings=tuple(_ring_state(values, f"queue{number}") for number in range(kind.queues)),
        broken=bool(values.get(_BROKEN, {}).get("broken")),
        section=device,
    )


def _numbered(each_queue: Iterable[Any]) -> dict[str, Any]:
    return {f"queue{number}": value for number, value in enumerate(each_queue)}


def _ring_values(ring: RingState) -> dict[str, int]:
    return {
        "entries": ring.entries,
        "alignment": _ALIGNMENT,
        "descriptors": ring.descriptors,
        "next_available": ring.next_available,
    }


def _ring_state(values: Values, queue: str) -> RingState:
    ring = values[queue]
    return RingState(
        entries=ring["entries"],
        descriptors=ring["descriptors"],
        next_available=ring["next_available"],
        **values[_RINGS][queue],
    )


def _registers_of(state: VirtioState, queues: Sequence[QueueRegisters]) -> dict[str, Any]:
    return {
        "low": state.written_features & 0xFFFFFFFF,
        "high": state.written_features >> 32,
        **_numbered(_register_values(queue) for queue in queues),
    }


def _register_values(queue: QueueRegisters) -> dict[str, Any]:
    halves: dict[str, int] = {}
    for name in ("descriptors", "available", "used"):
        address = getattr(queue, name)
        halves |= {f"{name}_low": address & 0xFFFFFFFF, f"{name}_high": address >> 32}
    return {"entries": queue.entries, "ready": queue.ready, **halves}


def _queue_registers(values: Values) -> QueueRegisters:
    addresses = {
        name: values[f"{name}_low"] | values[f"{name}_high"] << 32
        for name in ("descriptors", "available", "used")
    }
    return QueueRegisters(values["entries"], values["ready"], **addresses)
