"""The sections of block devices on virtio-mmio, in QEMU's format.

Its length depends on the data: the configuration space is preceded by its length, the queues by their
number.  Subsections follow.  An array of 1024 queues is written whole; this device has one queue, and the
others are zeros.  A description has all of it as one field ``virtio``.  (QEMU's ``hw/virtio/virtio.c``,
``virtio_save``.)
"""

from functools import lru_cache
from typing import Any, Final

from postcopy.errors import GuestError, StreamCut, StreamError
from postcopy.machine.virtio_state import (
    ADDRESS,
    BLK,
    DEFAULT_RING_ENTRIES,
    DEFAULT_VHOST_USER_ENTRIES,
    VHOST_USER_BLK,
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


def _of_one_queue(kind: Structure) -> tuple[Field, Field]:
    rest = kind.size_bytes * (_MOST_QUEUES - 1)
    return Field("queue", kind), Field("unused", pad(rest))


_SUBSECTIONS: Final = (
    Format("virtio/device_endian", 1, (Field("device_endian", U8),)),
    Format(_FEATURES, 1, (Field("features", U64),)),
    Format(_RINGS, 1, _of_one_queue(_RING_ADDRESSES)),
    Format(_SIZES, 1, (Field("entries", U32), Field("unused", pad(4 * (_MOST_QUEUES - 1))))),
    Format(_BROKEN, 1, (Field("broken", BOOL),)),
    Format(
        _EXTRA,
        1,
        (),
        (
            Format(
                _STATE,
                1,
                (Field("low", U32), Field("high", U32), *_of_one_queue(_REGISTERS)),
            ),
        ),
        prefix="virtio_mmio/",
    ),
    Format(_STARTED, 1, (Field("started", BOOL),)),
    Format("virtio/disabled", 1, (Field("disabled", BOOL),)),
)


class VirtioFormat:
    """The format of one device, for a :class:`~postcopy.stream.format_table.FormatTable`.

    :param device: what QEMU calls it; the section of its own drive can have requests in flight.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._is_local = device == BLK
        self.name = f"virtio-mmio@{ADDRESS:016x}/{device}"
        self.version = 2 if self._is_local else 1

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
        flag_at = at + _COUNT_BYTES + _QUEUE.size_bytes
        if len(data) < flag_at + self._is_local:
            return None
        queues = int.from_bytes(data[at : at + _COUNT_BYTES], "big")
        if queues != 1:
            raise StreamError(
                f"{self.name}: it has {queues} queues, ours has 1; give it num-queues=1"
            )
        if self._is_local and data[flag_at]:
            raise StreamError(
                f"{self.name}: it has requests in flight, which only its own host can end; let the "
                "source's guest run (cont), and migrate again"
            )
        return config

    def _format(self, config_bytes: int) -> Format:
        return _format(self.name, self.version, config_bytes, has_requests=self._is_local)


@lru_cache(8)
def _format(name: str, version: int, config_bytes: int, *, has_requests: bool) -> Format:
    fields = (
        *_HEAD,
        Field("config", buffer(config_bytes)),
        Field("queues", U32),
        Field("queue", _QUEUE),
        *((Field("requests_follow", U8),) if has_requests else ()),
    )
    return Format(name, version, fields, _SUBSECTIONS, minimum_version=version, prefix="virtio/")


FORMATS: Final = {device: VirtioFormat(device) for device in (BLK, VHOST_USER_BLK)}
"""By what QEMU calls the device.  The address in a section's name is the transport's, where QEMU's
``microvm`` has its first device."""

VIRTIO_BLK: Final = FORMATS[BLK]
NAME: Final = VIRTIO_BLK.name

_DEFAULT_ENTRIES: Final = {
    BLK: DEFAULT_RING_ENTRIES,
    VHOST_USER_BLK: DEFAULT_VHOST_USER_ENTRIES,
}


def values_of(state: VirtioState) -> dict[str, Any]:
    """What the section says of a device that stands still: no request is in flight."""
    ring = state.ring
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
        "queues": 1,
        "queue": {
            "entries": ring.entries,
            "alignment": _ALIGNMENT,
            "descriptors": ring.descriptors,
            "next_available": ring.next_available,
        },
        "requests_follow": 0,
        _FEATURES: {"features": state.features},
        _RINGS: {"queue": {"available": ring.available, "used": ring.used}},
        _EXTRA: {_STATE: _registers_of(state)},
    }
    default = _DEFAULT_ENTRIES[state.section]
    if ring.entries != default:
        values[_SIZES] = {"entries": default}
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
            "the guest's drive is on the legacy virtio-mmio transport, ours on the modern one; start the "
            "source with -global virtio-mmio.force-legacy=off"
        )
    registers = values[_EXTRA][_STATE]
    high = values.get(_FEATURES, {}).get("features", 0)
    return VirtioState(
        config=bytes(values["config"]),
        device_features_select=values["device_features_select"],
        driver_features_select=values["driver_features_select"],
        queue_select=values["queue_select"],
        status=values["status"],
        interrupt=values["interrupt"],
        written_features=registers["low"] | registers["high"] << 32,
        features=high or values["features_low"],
        queue=_queue_registers(registers["queue"]),
        ring=RingState(
            entries=values["queue"]["entries"],
            descriptors=values["queue"]["descriptors"],
            next_available=values["queue"]["next_available"],
            **values[_RINGS]["queue"],
        ),
        broken=bool(values.get(_BROKEN, {}).get("broken")),
        section=device,
    )


def _registers_of(state: VirtioState) -> dict[str, Any]:
    queue = state.queue
    halves: dict[str, int] = {}
    for name in ("descriptors", "available", "used"):
        address = getattr(queue, name)
        halves |= {f"{name}_low": address & 0xFFFFFFFF, f"{name}_high": address >> 32}
    return {
        "low": state.written_features & 0xFFFFFFFF,
        "high": state.written_features >> 32,
        "queue": {"entries": queue.entries, "ready": queue.ready, **halves},
    }


def _queue_registers(values: Values) -> QueueRegisters:
    addresses = {
        name: values[f"{name}_low"] | values[f"{name}_high"] << 32
        for name in ("descriptors", "available", "used")
    }
    return QueueRegisters(values["entries"], values["ready"], **addresses)
