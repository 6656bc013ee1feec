"""The virtio-mmio transport, modern (version 2), of a device with one queue.

The registers are the guest's side of it.  The requests are done by a thread of the device.  A vCPU that
resets the device, or changes its ring, waits until the request under way has ended: afterwards the device
writes nothing into memory that is the driver's again.  (Virtual I/O Device 1.2, sections 2.1, 3.1, 4.2.2.)
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Protocol

from postcopy.errors import GuestError, KernelError, RingError
from postcopy.machine.guest_memory import GuestMemory
from postcopy.machine.request_thread import RequestThread
from postcopy.machine.vcpu import NOT_COME
from postcopy.machine.virtio_state import (
    ADDRESS,
    DEFAULT_RING_ENTRIES,
    VERSION_1,
    QueueRegisters,
    Status,
    VirtioState,
)
from postcopy.virtio.ring import Chain, RingLayout, SplitQueue, check_size

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
_PAGE_BYTES: Final = 4096
_MOST_BYTES: Final = 64 << 20
_REQUEST_DONE, _CONFIG_CHANGED = 1, 2


class Device(Protocol):
    """What stands behind the transport.

    :ivar device_id: the number of its kind.
    :ivar features: what it offers.
    :ivar config: the configuration space.
    """

    device_id: int
    features: int
    config: bytes

    def check_config(self, config: bytes) -> None:
        """Refuse the configuration space of another device.

        :raises GuestError: why the guest cannot have this one in its place.
        """

    def flush(self) -> None:
        """Make what was written last.

        :raises GuestError: that fails.
        """

    def close(self) -> None:
        """No request comes any more."""

    def handle(self, memory: GuestMemory, chain: Chain) -> int:
        """Do a request and return how many bytes were written to the guest's memory.

        :param chain: of buffers that are all RAM, and no more than 64 MiB together.
        :raises RingError: it cannot be.
        """


class VirtioMmio:
    """A device at :data:`ADDRESS`, and empty transports in the seven places below it.

    :ivar address: of the first transport; ``size_bytes``: of all of them.
    :ivar thread: does the requests; it is stopped and let run with the vCPUs.
    :param on_lost: gets the reason why the guest cannot go on, such as a page of a request that is lost.
    """

    address = _FIRST_ADDRESS
    size_bytes = _SLOTS * _SLOT_BYTES

    def __init__(self, device: Device, memory: GuestMemory, on_lost: Callable[[str], None]) -> None:
        self._device = device
        self._memory = memory
        self._on_lost = on_lost
        self._warned = False
        self._state = VirtioState(device.config)
        self._at_work = False
        self._queue: SplitQueue | None = None  # made by the thread: that looks into guest memory
        self._identity = {
            **_EMPTY,
            DEVICE_ID: device.device_id,
            VENDOR_ID: int.from_bytes(b"QEMU", "little"),
        }
        self.thread = RequestThread("the drive", self._serve, self._awaited)

    # --- the guest's accesses, on the vCPUs' threads

    def read(self, offset: int, size_bytes: int) -> int:
        """What the guest finds there; zeros where nothing is."""
        slot, register = divmod(offset, _SLOT_BYTES)
        if slot != _SLOTS - 1:
            return _EMPTY.get(register, 0)
        if register >= CONFIG:
            at = register - CONFIG
            return int.from_bytes(self._device.config[at : at + size_bytes], "little")
        if size_bytes != 4:
            return 0
        with self.thread.turn:
            return self._read(register)

    def write(self, offset: int, size_bytes: int, value: int) -> None:
        """What the guest's write does; swallowed where nothing is."""
        slot, register = divmod(offset, _SLOT_BYTES)
        if slot != _SLOTS - 1 or size_bytes != 4:
            return
        if register == QUEUE_NOTIFY:
            if not value:
                self.thread.kick()
        elif register in {STATUS, QUEUE_READY}:
            with self.thread.between_requests():
                self._store_progress()
                self._change(register, value)
                self._update_ring()
            self.thread.kick()  # what stands in the ring already
        else:
            with self.thread.turn:
                self._set(register, value)

    def _read(self, register: int) -> int:
        state = self._state
        if register == DEVICE_FEATURES:
            return self._device.features >> 32 * min(state.device_features_select, 2) & _WORD
        if register == QUEUE_MOST:
            return 0 if state.queue_select else DEFAULT_RING_ENTRIES
        if register == QUEUE_READY:
            return int(state.queue.ready and not state.queue_select)
        if register == INTERRUPT_STATUS:
            return state.interrupt
        if register == STATUS:
            return state.status
        return self._identity.get(register, 0)

    def _change(self, register: int, value: int) -> None:
        state = self._state
        if register == QUEUE_READY:
            if not state.queue_select:
                self._make_ready(ready=bool(value & 1))
        elif not value:
            self._state = VirtioState(self._device.config)
        else:
            self._state = replace(state, status=value & 0xFF | state.status & Status.NEEDS_RESET)
            if value & ~state.status & Status.FEATURES_OK:
                self._agree()

    def _make_ready(self, *, ready: bool) -> None:
        state, queue = self._state, self._state.queue
        ring = state.ring
        if ready:
            ring = replace(
                ring,
                entries=queue.entries or DEFAULT_RING_ENTRIES,
                descriptors=queue.descriptors,
                available=queue.available,
                used=queue.used,
            )
        self._state = replace(state, queue=replace(queue, ready=ready), ring=ring)

    def _agree(self) -> None:
        state = self._state
        wanted = state.written_features
        if wanted & ~self._device.features or not wanted & VERSION_1:
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
        elif not state.queue_select:
            self._state = replace(state, queue=_with_register(state.queue, register, value))

    # --- requests, on the device's thread

    def _serve(self) -> bool:
        if not self._at_work:
            return False
        try:
            queue = self._queue = self._queue or self._open_queue()
            if not queue.waiting():
                return False
            chain = queue.take()
            self._check(chain)
            written = self._device.handle(self._memory, chain)
            queue.complete(chain.head, written)
            wants_interrupt = queue.wants_interrupt()
        except RingError as error:
            with self.thread.turn:
                self._break(error)
            return False
        except KernelError as error:
            self._on_lost(f"a request to the drive touches a page that is lost: {error}")
            return False
        except Exception as error:
            _log.exception("the drive cannot go on")
            self._on_lost(f"the drive cannot go on: {type(error).__name__}: {error}")
            return False
        if wants_interrupt:
            self._raise(_REQUEST_DONE)
        return True

    def _check(self, chain: Chain) -> None:
        buffers = (*chain.readable, *chain.writable)
        total = sum(buffer.length for buffer in buffers)
        if total > _MOST_BYTES:  # the device copies it
            raise RingError(f"a request of {total} bytes; {_MOST_BYTES >> 20} MiB are possible")
        for buffer in buffers:
            self._memory.check(buffer.address, buffer.length)

    def _open_queue(self) -> SplitQueue:
        ring, memory = self._state.ring, self._memory
        check_size(ring.entries)
        layout = RingLayout(ring.entries)
        return SplitQueue(
            ring.entries,
            memory.area(ring.descriptors, layout.descriptors_bytes, 16),
            memory.area(ring.available, layout.available_bytes, 2),
            memory.area(ring.used, layout.used_bytes, 4),
            next_available=ring.next_available,
        )

    def _raise(self, interrupt: int) -> None:
        with self.thread.turn:
            self._state = replace(self._state, interrupt=self._state.interrupt | interrupt)

    # --- under the thread's lock

    def _store_progress(self) -> None:
        if self._queue is not None:
            ring = replace(self._state.ring, next_available=self._queue.next_available)
            self._state = replace(self._state, ring=ring)

    def _update_ring(self) -> None:
        state, self._queue = self._state, None
        ready = state.queue.ready and state.status & Status.DRIVER_OK
        self._at_work = bool(ready) and not state.broken

    def _break(self, error: RingError) -> None:
        """Ask the driver to reset the device, which does nothing until then."""
        self._store_progress()
        state, self._at_work = self._state, False
        status = state.status | Status.NEEDS_RESET
        interrupt = state.interrupt | _CONFIG_CHANGED
        self._state = replace(state, status=status, interrupt=interrupt, broken=True)
        if not self._warned:  # a guest can do this without end
            self._warned = True
            _log.warning("the drive waits for a reset by the guest's driver: %s", error)

    def _awaited(self) -> str:
        address = self._memory.waits_at
        if address is None:
            return "a request to its file; see what the host's disk does, and stop the guest then"
        return f"the guest's page at {address & -_PAGE_BYTES:#x} {NOT_COME}"

    # --- moving, of a guest that stands still

    def save(self) -> VirtioState:
        """The state; no request is in flight, and what the guest has written is on the disk.

        :raises GuestError: it cannot be brought there.
        """
        self._device.flush()
        with self.thread.between_requests():
            self._store_progress()
            return self._state

    def check(self, state: VirtioState) -> None:
        """Refuse a state that this device cannot have.

        :raises GuestError: why.
        """
        self._device.check_config(state.config)
        lacking = state.features & ~self._device.features
        if lacking:
            raise GuestError(
                f"the guest's driver uses virtio features {lacking:#x}, which this drive does not offer"
            )

    def load(self, state: VirtioState | None) -> None:
        """Take over a state that :meth:`check` has let pass; None: be as after a reset."""
        with self.thread.between_requests():
            config = self._device.config
            self._state = VirtioState(config) if state is None else replace(state, config=config)
            self._update_ring()

    def close(self) -> bool:
        """End the thread and let go of the device.

        :return: whether the thread has ended; else the guest's memory must stay mapped.
        """
        ended = self.thread.close()
        if ended:
            self._device.close()
        return ended


def check_state(drive: VirtioMmio | None, state: VirtioState | None) -> None:
    """Refuse the state of a drive that the machine has not, or that its drive cannot have.

    None in place of a state is a drive that the guest has never used.

    :raises GuestError: why.
    """
    if state is None:
        return
    if drive is None:
        raise GuestError(
            "the guest has a drive, this machine none; start it with --drive FILE, of the same disk"
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
