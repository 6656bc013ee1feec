"""What of a virtio-mmio device moves with the machine: its registers, and how far its ring has come.

Virtual I/O Device 1.2, sections 2.1 (status), 2.7 (rings) and 4.2.2 (registers).
"""

import enum
from dataclasses import dataclass, replace
from typing import Final

from postcopy.errors import GuestError

ADDRESS: Final = 0xFEB00E00
"""Where QEMU's ``microvm`` has its first device: the last of eight transports of 512 bytes."""

BLK: Final = "virtio-blk"
VHOST_USER_BLK: Final = "vhost-user-blk"
"""What QEMU calls a drive of its own, and one in another process."""

VIRTIO_NET: Final = "virtio-net"
"""And a network device, in whichever process."""

DEFAULT_RING_ENTRIES: Final = 256
DEFAULT_VHOST_USER_ENTRIES: Final = 128
VERSION_1: Final = 1 << 32

CONFIG_BYTES: Final = 57
"""Of a drive's configuration space, as QEMU has it; what follows belongs to features not offered."""


def check_capacity(config: bytes, name: str, sectors: int) -> None:
    """Refuse a drive of another size than the guest has.

    :param config: the configuration space of the guest's drive.
    :param name: of this machine's; ``sectors``: its size.
    :raises GuestError: it is another.
    """
    found = int.from_bytes(config[:8], "little")
    if found != sectors:
        raise GuestError(
            f"the guest's drive has {found} sectors, {name} has {sectors}; give both sides the same disk"
        )


class Status(enum.IntFlag):
    """The bits of the status register that mean something to the device."""

    FEATURES_OK = 8
    DRIVER_OK = 4
    NEEDS_RESET = 64


@dataclass(frozen=True, slots=True)
class QueueRegisters:
    """What the driver has written to the registers of the queue.

    :ivar descriptors: guest address of the descriptor table; ``available`` and ``used``: of the two rings.
    """

    entries: int = 0
    ready: bool = False
    descriptors: int = 0
    available: int = 0
    used: int = 0


@dataclass(frozen=True, slots=True)
class RingState:
    """The ring as it was when the driver made the queue ready; no addresses before.

    :ivar next_available: index of the next request, modulo 65536.
    """

    entries: int = DEFAULT_RING_ENTRIES
    descriptors: int = 0
    available: int = 0
    used: int = 0
    next_available: int = 0


@dataclass(frozen=True, slots=True)
class VirtioState:
    """One device, after a reset unless told otherwise.

    :ivar config: the configuration space.
    :ivar section: what the device is called on the wire.
    :ivar written_features: what the driver has written, before the device has agreed.
    :ivar features: what both have agreed on.
    :ivar queues: the registers of each queue; ``rings``: what it is by them.
    :ivar broken: a ring was invalid, and the device does nothing until it is reset.
    """

    config: bytes
    device_features_select: int = 0
    driver_features_select: int = 0
    queue_select: int = 0
    status: int = 0
    interrupt: int = 0
    written_features: int = 0
    features: int = 0
    queues: tuple[QueueRegisters, ...] = (QueueRegisters(),)
    rings: tuple[RingState, ...] = (RingState(),)
    broken: bool = False
    section: str = BLK

    @property
    def selected(self) -> QueueRegisters | None:
        """The registers of the queue that the driver has selected; None: there is no such queue."""
        return self.queues[self.queue_select] if self.queue_select < len(self.queues) else None

    def with_selected(self, queue: QueueRegisters, ring: RingState | None = None) -> "VirtioState":
        """The state with other registers of that queue, and another ring if one is given."""
        queues, rings = list(self.queues), list(self.rings)
        queues[self.queue_select] = queue
        if ring is not None:
            rings[self.queue_select] = ring
        return replace(self, queues=tuple(queues), rings=tuple(rings))
