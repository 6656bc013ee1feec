"""The back ends that a vhost-user device has, one after another, at one socket.

Each is another :class:`~postcopy.guest.SharingProcess` of the machine.  The next disk must be the same.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from postcopy.errors import GuestError, PostcopyError, Refused
from postcopy.guest import SharingProcess
from postcopy.machine.virtio_state import (
    CONFIG_BYTES,
    DEFAULT_RING_ENTRIES,
    DEFAULT_VHOST_USER_ENTRIES,
    VHOST_USER_BLK,
    VIRTIO_NET,
    check_capacity,
)
from postcopy.vhost_user.back_end_process import ANSWER_S, BackEndProcess
from postcopy.vhost_user.front_end import MemoryPart
from postcopy.vhost_user.messages import ProtocolFeature
from postcopy.virtio.block import SECTOR_BYTES, BlockFeature
from postcopy.virtio.ring import Feature

_log = logging.getLogger(__name__)

_RING_FEATURES: Final = int(Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.VERSION_1)
_DISK_FEATURES: Final = _RING_FEATURES | int(
    BlockFeature.SIZE_MAX
    | BlockFeature.SEG_MAX
    | BlockFeature.GEOMETRY
    | BlockFeature.RO
    | BlockFeature.BLK_SIZE
    | BlockFeature.FLUSH
    | BlockFeature.TOPOLOGY
    | BlockFeature.DISCARD
    | BlockFeature.WRITE_ZEROES
)
"""What a back end may do for a driver.  Neither several queues, nor writes to the configuration."""

_NET_MAC: Final = 1 << 5
"""``VIRTIO_NET_F_MAC`` (Virtual I/O Device 1.2, 5.1.3): the configuration space begins with the address."""
_ADDRESS: Final = bytes.fromhex("525400123456")
"""As QEMU's first network device has it."""

_NET_MRG_RXBUF: Final = 1 << 15
"""``VIRTIO_NET_F_MRG_RXBUF`` (5.1.3); a block device has no such bit."""
_DISK_SIGNS: Final = int(BlockFeature.SEG_MAX | BlockFeature.BLK_SIZE | BlockFeature.FLUSH)
"""Of a network these bits are offloads, which come with merged buffers."""
_NET_PROTOCOL: Final = ProtocolFeature.RARP | ProtocolFeature.MTU

_CAPACITY_BYTES: Final = 8
_NEXT_ANSWER_S: Final = 2.0
_END_S: Final = 1.0
"""A back end that ends in good order ends its requests after it has closed the connection."""


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """A kind of virtio device that back ends can be.

    :ivar name: for messages.
    :ivar device_id: the number of the kind; ``section``: how the device is called on the wire.
    :ivar queues: how many it has; ``most_entries``: of each.
    :ivar features: what a back end may do for a driver; ``own_features``: what the front end does itself.
    :ivar config: the front end's configuration space; None: the back end has it.
    :ivar is_drained: its rings are stopped only when every request is done: the driver waits for each.
    """

    name: str
    device_id: int
    section: str
    queues: int
    most_entries: int
    features: int
    own_features: int = 0
    config: bytes | None = None
    is_drained: bool = True

    def config_of(self, process: BackEndProcess) -> bytes:
        """The configuration space of the device that a back end is.

        :raises GuestError: the back end does not say, or is another device.
        """
        self.check(process)
        return process.configuration(CONFIG_BYTES) if self.config is None else self.config

    def check(self, process: BackEndProcess) -> None:
        """Refuse a back end of the other kind, as far as that can be seen: the protocol does not say.

        :raises GuestError: it offers what only the other kind has.
        """
        offers = f"{process.name} is no {self.name}: it offers"
        is_net = process.features & _NET_MRG_RXBUF or process.offered & _NET_PROTOCOL
        if is_net and self.device_id != NET.device_id:
            raise GuestError(
                f"{offers} merged buffers, RARP or an MTU, as a network device does; give it by "
                "--vhost-user-net"
            )
        is_disk = not is_net and _DISK_SIGNS & process.features == _DISK_SIGNS
        if is_disk and self.device_id != DISK.device_id:
            raise GuestError(
                f"{offers} what a disk does (SEG_MAX, BLK_SIZE, FLUSH), and nothing of a network; give "
                "it by --vhost-user-blk"
            )


DISK: Final = DeviceKind("disk", 2, VHOST_USER_BLK, 1, DEFAULT_VHOST_USER_ENTRIES, _DISK_FEATURES)
NET: Final = DeviceKind(
    "network device",
    1,
    VIRTIO_NET,
    2,
    DEFAULT_RING_ENTRIES,
    _RING_FEATURES,
    own_features=_NET_MAC,
    config=_ADDRESS,
    is_drained=False,
)


class Device(Protocol):
    """What a back end works for."""

    def wake(self) -> None:
        """The connection has failed, or is another one; any thread."""

    def hold(self) -> None:
        """See :class:`postcopy.guest.SharingProcess`."""

    def release(self) -> None:
        """See :class:`postcopy.guest.SharingProcess`."""


class BackEnds:
    """Used by one thread, but for :attr:`process`, which all may read.

    :ivar process: the one that is connected now.
    :ivar features: what the driver is offered; ``config``: the configuration space.
    :param kind: what they are.
    :param path: of the socket.
    :param parts: the guest's memory, as a back end gets it.
    :param share: has the machine's memory shared with a process from now on; ``unshare``: no more.
    :raises Refused: there is no back end that can be used.
    """

    def __init__(
        self,
        kind: DeviceKind,
        path: str,
        parts: Sequence[MemoryPart],
        share: Callable[[SharingProcess], None],
        unshare: Callable[[SharingProcess], None],
    ) -> None:
        self.kind, self.path = kind, path
        self._parts = parts
        self._share, self._unshare = share, unshare
        self._device: Device | None = None
        self._told = ""
        self.process: _Process | None = None
        try:
            first = _Process(self, ANSWER_S)
            with _closed_on_failure(first):
                self.features = first.features & kind.features | kind.own_features
                self.config = kind.config_of(first)
                self._use(first)
        except PostcopyError as error:
            raise Refused(str(error)) from error

    @property
    def parts(self) -> Sequence[MemoryPart]:
        """The guest's memory."""
        return self._parts

    @property
    def device(self) -> Device | None:
        """What they work for; None: it is being made yet."""
        return self._device

    def begin(self, device: Device) -> None:
        """The device has been made."""
        self._device = device

    def check_config(self, config: bytes) -> None:
        """Refuse another disk, or another network address.

        :param config: its configuration space.
        :raises GuestError: it has another size, or address.
        """
        if self.kind.config is not None:
            if config[: len(_ADDRESS)] != _ADDRESS:
                raise GuestError(
                    f"the guest's network device has the address {config[:6].hex(':')}, this machine's "
                    f"{_ADDRESS.hex(':')}; give the source that one (mac=)"
                )
            return
        sectors = int.from_bytes(self.config[:_CAPACITY_BYTES], "little")
        check_capacity(config, f"the back end at {self.path}", sectors)

    def lose(self) -> None:
        """The present one has gone, and has had some time to end."""
        process = self.process
        self.let_go()
        if process is not None:
            self._tell(
                f"{process.failure}; the guest runs on, and its requests wait for a back end"
            )
            process.wait_for_end(_END_S)

    def let_go(self) -> None:
        """Have none any more."""
        process, self.process = self.process, None
        if process is not None:
            self._unshare(process)
            process.close()

    def find(self) -> bool:
        """Connect to the next one; return whether there is one."""
        try:
            process = _Process(self, _NEXT_ANSWER_S)
            with _closed_on_failure(process):
                self._check_same(process)
                self._use(process)
        except PostcopyError as error:
            self._tell(f"{error}; it is tried again")
            return False
        self._told = ""
        _log.info("%s does the requests now", process.name)
        return True

    def _check_same(self, process: BackEndProcess) -> None:
        self.check_config(self.kind.config_of(process))
        if lacking := self.features & ~process.features & ~self.kind.own_features:
            raise Refused(
                f"{process.name} does not offer virtio features {lacking:#x}, as the one before did"
            )

    def _use(self, process: "_Process") -> None:
        self._share(process)
        self.process = process

    def _tell(self, what: str) -> None:
        if what != self._told:
            self._told = what
            _log.warning("%s", what)


class _Process(BackEndProcess):
    """As the guest's engines know it."""

    def __init__(self, back_ends: BackEnds, timeout_s: float) -> None:
        self._back_ends = back_ends
        super().__init__(back_ends.path, back_ends.parts, self._wake, timeout_s)

    def _wake(self) -> None:
        if self._back_ends.device is not None:
            self._back_ends.device.wake()

    def hold(self) -> None:
        """See :class:`postcopy.guest.SharingProcess`."""
        if self._back_ends.device is not None:
            self._back_ends.device.hold()

    def release(self) -> None:
        """See :class:`postcopy.guest.SharingProcess`."""
        if self._back_ends.device is not None:
            self._back_ends.device.release()


@contextlib.contextmanager
def _closed_on_failure(process: BackEndProcess) -> Iterator[None]:
    try:
        yield
    except BaseException:
        process.close()
        raise


def disk_bytes(path: str) -> int:
    """The size of a back end's disk.

    :raises Refused: there is no back end, or it does not say.
    """
    try:
        process = BackEndProcess(path, ())
        with contextlib.closing(process):
            DISK.check(process)
            config = process.configuration(_CAPACITY_BYTES)
    except PostcopyError as error:
        raise Refused(str(error)) from error
    return int.from_bytes(config, "little") * SECTOR_BYTES
