"""The virtio-mmio transport, modern (version 2): the registers.

The requests are done elsewhere (:class:`Queue`).  A vCPU that resets the device, or changes its ring, waits
until no request is under way: afterwards the device writes nothing into memory that is the driver's again.
(Virtual I/O Device 1.2, sections 2.1, 3.1, 4.2.2.)
"""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Final, Protocol

from postcopy.errors import GuestError, RingError
from postcopy.machine.vcpu import Runner
from postcopy.machine.virtio_state import (
    ADDRESS,
    BLK,
    VERSION_1,
    VHOST_USER_BLK,
    VIRTIO_NET,
    QueueRegisters,
    RingState,
    Status,
    VirtioState,
)

_log = logging.getLogger(__name__)

MAGIC, VERSION, DEVICE_ID, VENDOR_ID = 0x00, 0x04, 0x08, 0x0C
DEVICE_FEATURES, DEVICE_FEATURES_SELECT = 0x10, 0x14
DRIVER_FEATURES, DRIVER_FEATURES_SELECT = 0x20, 0x24
QUEUE_SELECT, QUEUE_MOST, QUEUE_ENTRIES = 0x30, 0x34, 0x38
QUEUE_READY, QUEUE_NOTIFY = 0x44, 0x50
INTERRUPT_STATUS, INTERRUPT_ACKNOWLEDGE, STATUS = 0x60, 0x64, 0x70
CONFIG: Final = 0x100

NOTIFY_ADDRESS: Final = ADDRESS + QUEUE_NOTIFY

_ADDRESSES: Final = {
    0x80: ("descriptors", 0),
    0x84: ("descriptors", 32),
    0x90: ("available", 0),
    0x94: ("available", 32),
    0xA0: ("used", 0),
    0xA4: ("used", 32),
}
_SELECTS: Final = {
    DEVICE_FEATURES_SELECT: ("device_features_select", 0xFFFFFFFF),
    DRIVER_FEATURES_SELECT: ("driver_features_select", 0xFFFFFFFF),
    QUEUE_SELECT: ("queue_select", 0xFFFF),
}
_FIRST_ADDRESS: Final = 0xFEB00000
_SLOT_BYTES: Final = 0x200
_SLOTS: Final = 8
_EMPTY: Final = {MAGIC: int.from_bytes(b"virt", "little"), VERSION: 2}
_WORD: Final = 0xFFFFFFFF
REQUEST_DONE, CONFIG_CHANGED = 1, 2
"""The bits of the interrupt status."""

_NAMES: Final = {BLK: "a drive", VHOST_USER_BLK: "a drive", VIRTIO_NET: "a network device"}
_OPTIONS: Final = {
    BLK: "--drive FILE, of the same disk",
    VHOST_USER_BLK: "--vhost-user-blk SOCKET, of the same disk",
    VIRTIO_NET: "--vhost-user-net SOCKET",
}


class Queues(Protocol):
    """What does the requests of the device's queues, and what the device is by that.

    :ivar device_id: the number of its kind.
    :ivar section: how the device is called on the wire.
    :ivar features: what it offers; ``config``: the configuration space.
    :ivar queues: how many it has.
    :ivar most_entries: how many entries a ring can have.
    :ivar runner: runs with the guest, and stands still with it.
    :ivar kick_fds: an eventfd of each queue: a write to it is :meth:`kick`.
    """

    device_id: int
    section: str
    features: int
    config: bytes
    queues: int
    most_entries: int
    kick_fds: tuple[int, ...]

    @property
    def runner(self) -> Runner:
        """See above."""

    def report_to(
        self, interrupt: Callable[[int], None], broken: Callable[[RingError], None]
    ) -> None:
        """Call these: with the bits of an interrupt; when a ring is invalid, and none served any more."""

    def kick(self, number: int) -> None:
        """There may be a request in that queue.  Harmless when closed."""

    def stopped(self) -> AbstractContextManager[object]:
        """A moment in which no request is under way and none begins; may have to be waited for."""

    def serve(self, rings: Sequence[RingState], features: int) -> None:
        """Do the requests of these rings from now on, all or none.  Only while :meth:`stopped`."""

    def next_available(self) -> Sequence[int]:
        """Index of the next request of each ring that is served, modulo 65536.  Only while stopped."""

    def check_config(self, config: bytes) -> None:
        """Refuse the configuration space of another device.

        :raises GuestError: why the guest cannot have this one in its place.
        """

    def flush(self) -> None:
        """Make what was written last, if that is in our hands.

        :raises GuestError: that fails.
        """

    def announce(self) -> None:
        """Tell the device's network, if it is on one, where the guest is."""

    def close(self) -> bool:
        """End it; return whether it touches no guest memory any more."""


class VirtioMmio:
    """A device at :data:`ADDRESS`, and empty transports in the seven places below it.

    :ivar address: of the first transport; ``size_bytes``: of all of them.
    """

    address = _FIRST_ADDRESS
    size_bytes = _SLOTS * _SLOT_BYTES

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self._lock = (
            threading.RLock()
        )  # of the state; inside Queues.stopped() where both are wanted
        self._warned = False
        self._state = self._reset()
        self._identity = {
            **_EMPTY,
            DEVICE_ID: queues.device_id,
            VENDOR_ID: int.from_bytes(b"QEMU", "little"),
        }
        queues.report_to(self._raise, self._break)

    @property
    def runner(self) -> Runner:
        """What is stopped and let run with the vCPUs."""
        return self._queues.runner

    @property
    def kick_fds(self) -> tuple[int, ...]:
        """An eventfd of each queue: a write to it is a notification of the queue."""
        return self._queues.kick_fds

    def _reset(self) -> VirtioState:
        has = self._queues
        return VirtioState(
            has.config,
            section=has.section,
            queues=has.queues * (QueueRegisters(),),
            rings=has.queues * (RingState(has.most_entries),),
        )

    # --- the guest's accesses, on the vCPUs' threads

    def read(self, offset: int, size_bytes: int) -> int:
        """What the guest finds there; zeros where nothing is."""
        slot, register = divmod(offset, _SLOT_BYTES)
        if slot != _SLOTS - 1:
            return _EMPTY.get(register, 0)
        if register >= CONFIG:
            at = register - CONFIG
            return int.from_bytes(self._queues.config[at : at + size_bytes], "little")
        if size_bytes != 4:
            return 0
        with self._lock:
            return self._read(register)

    def write(self, offset: int, size_bytes: int, value: int) -> None:
        """What the guest's write does; swallowed where nothing is."""
        slot, register = divmod(offset, _SLOT_BYTES)
        if slot != _SLOTS - 1 or size_bytes != 4:
            return
        if register == QUEUE_NOTIFY:
            if value < self._queues.queues:
                self._queues.kick(value)
        elif register in {STATUS, QUEUE_READY}:
            with self._queues.stopped(), self._lock:
                self._store_progress()
                self._change(register, value)
                self._update_rings()
        else:
            with self._lock:
                self._set(register, value)

    def _read(self, register: int) -> int:
        state = self._state
        if register == DEVICE_FEATURES:
            return self._queues.features >> 32 * min(state.device_features_select, 2) & _WORD
        if register == QUEUE_MOST:
            return self._queues.most_entries if state.selected else 0
        if register == QUEUE_READY:
            return int(state.selected is not None and state.selected.ready)
        if register == INTERRUPT_STATUS:
            return state.interrupt
        if register == STATUS:
            return state.status
        return self._identity.get(register, 0)

    def _change(self, register: int, value: int) -> None:
        state = self._state
        if register == QUEUE_READY:
            if state.selected:
                self._make_ready(state.selected, ready=bool(value & 1))
        elif not value:
            self._state = self._reset()
        else:
            self._state = replace(state, status=value & 0xFF | state.status & Status.NEEDS_RESET)
            if value & ~state.status & Status.FEATURES_OK:
                self._agree()

    def _make_ready(self, queue: QueueRegisters, *, ready: bool) -> None:
        state = self._state
        ring = state.rings[state.queue_select]
        if ready:
            ring = replace(
                ring,
                entries=queue.entries or self._queues.most_entries,
                descriptors=queue.descriptors,
                available=queue.available,
                used=queue.used,
            )
        self._state = state.with_selected(replace(queue, ready=ready), ring)

    def _agree(self) -> None:
        state = self._state
        wanted = state.written_features
        if wanted & ~self._queues.features or not wanted & VERSION_1:
            self._state = replace(state, status=state.status & ~Status.FEATURES_OK)
        else:
            self._state = replace(state, features=wanted)

    def _set(self, register: int, value: int) -> None:
        state = self._state
        value &= _WORD
        if register in _SELECTS:
            name, mask = _SELECTS[register]
            changed: dict[str, Any] = {name: value & mask}
            self._state = replace(state, **changed)
        elif register == DRIVER_FEATURES and state.driver_features_select < 2:
            features = _with_word(state.written_features, 32 * state.driver_features_select, value)
            self._state = replace(state, written_features=features)
        elif register == INTERRUPT_ACKNOWLEDGE:
            self._state = replace(state, interrupt=state.interrupt & ~value)
        elif state.selected:
            self._state = state.with_selected(_with_register(state.selected, register, value))

    # --- what the queue says

    def _raise(self, interrupt: int) -> None:
        with self._lock:
            self._state = replace(self._state, interrupt=self._state.interrupt | interrupt)

    def _break(self, error: RingError) -> None:
        """Ask the driver to reset the device, which does nothing until then."""
        with self._lock:
            self._store_progress()
            self._state = replace(
                self._state, status=self._state.status | Status.NEEDS_RESET, broken=True
            )
            self._raise(CONFIG_CHANGED)
        if not self._warned:  # a guest can do this without end
            self._warned = True
            _log.warning("the virtio device waits for a reset by the guest's driver: %s", error)

    def _store_progress(self) -> None:
        reached = self._queues.next_available()
        if reached:
            both = zip(self._state.rings, reached, strict=True)
            rings = tuple(replace(ring, next_available=index) for ring, index in both)
            self._state = replace(self._state, rings=rings)

    def _update_rings(self) -> None:
        state = self._state
        ready = all(queue.ready for queue in state.queues)
        served = ready and state.status & Status.DRIVER_OK and not state.broken
        self._queues.serve(state.rings if served else (), state.features)

    # --- moving, of a guest that stands still

    def save(self) -> VirtioState:
        """The state; no request is in flight, and what the guest has written is on the disk.

        :raises GuestError: it cannot be brought there.
        """
        self._queues.flush()
        with self._queues.stopped(), self._lock:
            self._store_progress()
            return self._state

    def check(self, state: VirtioState) -> None:
        """Refuse a state that this device cannot have.

        :raises GuestError: why.
        """
        if state.section != self._queues.section:
            raise GuestError(
                f"the guest's virtio device is a {state.section}, this machine's a {self._queues.section}; "
                f"give the machine {_OPTIONS[state.section]}"
            )
        self._queues.check_config(state.config)
        lacking = state.features & ~self._queues.features
        if lacking:
            raise GuestError(
                f"the guest's driver uses virtio features {lacking:#x}, which this device does not offer"
            )

    def load(self, state: VirtioState | None) -> None:
        """Take over a state that :meth:`check` has let pass; None: be as after a reset."""
        with self._queues.stopped(), self._lock:
            config = self._queues.config
            self._state = self._reset() if state is None else replace(state, config=config)
            self._update_rings()

    def close(self) -> bool:
        """End the queue, and let go of the device.

        :return: whether that has ended; else the guest's memory must stay mapped.
        """
        return self._queues.close()


def check_state(drive: VirtioMmio | None, state: VirtioState | None) -> None:
    """Refuse the state of a device that the machine has not, or that its device cannot have.

    None in place of a state is a device that the guest has never used.

    :raises GuestError: why.
    """
    if state is None:
        return
    if drive is None:
        raise GuestError(
            f"the guest has {_NAMES[state.section]}, this machine none; start it with "
            f"{_OPTIONS[state.section]}"
        )
    drive.check(state)


def _with_word(value: int, shift: int, word: int) -> int:
    return value & ~(_WORD << shift) | word << shift


def _with_register(queue: QueueRegisters, register: int, value: int) -> QueueRegisters:
    if register == QUEUE_ENTRIES:
        return replace(queue, entries=value & 0xFFFF)
    if register in _ADDRESSES:
        name, shift = _ADDRESSES[register]
        changed: dict[str, Any] = {name: _with_word(getattr(queue, name), shift, value)}
        return replace(queue, **changed)
    return queue
