"""The queue of a device of this process: its thread takes the driver's requests and does them."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final, Protocol

from postcopy.errors import KernelError, RingError
from postcopy.machine.guest_memory import GuestMemory
from postcopy.machine.request_thread import RequestThread
from postcopy.machine.vcpu import NOT_COME
from postcopy.machine.virtio_mmio import REQUEST_DONE
from postcopy.machine.virtio_state import BLK, DEFAULT_RING_ENTRIES, RingState
from postcopy.virtio.ring import Chain, RingLayout, SplitQueue, check_size

_log = logging.getLogger(__name__)

_PAGE_BYTES: Final = 4096
_MOST_BYTES: Final = 64 << 20


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


class RequestQueue:
    """:class:`postcopy.machine.virtio_mmio.Queues`, of a device in this process.

    :param on_lost: gets the reason why the guest cannot go on, such as a page of a request that is lost.
    """

    section = BLK
    queues = 1
    most_entries = DEFAULT_RING_ENTRIES

    def __init__(self, device: Device, memory: GuestMemory, on_lost: Callable[[str], None]) -> None:
        self._device = device
        self._memory = memory
        self._on_lost = on_lost
        self.device_id, self.features = device.device_id, device.features
        self.config = device.config
        self._ring: RingState | None = None
        self._queue: SplitQueue | None = None  # made by the thread: that looks into guest memory
        self._interrupt: Callable[[int], None] = lambda _: None
        self._broken: Callable[[RingError], None] = lambda _: None
        self.runner = RequestThread("the drive", self._serve, self._awaited)
        self.kick_fds: tuple[int, ...] = (self.runner.kick_fd,)

    # --- postcopy.machine.virtio_mmio.Queues

    def report_to(
        self, interrupt: Callable[[int], None], broken: Callable[[RingError], None]
    ) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        self._interrupt, self._broken = interrupt, broken

    def kick(self, number: int) -> None:  # noqa: ARG002
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        self.runner.kick()

    def stopped(self) -> AbstractContextManager[object]:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        return self.runner.between_requests()

    def serve(self, rings: Sequence[RingState], features: int) -> None:  # noqa: ARG002
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        self._ring, self._queue = (rings[0] if rings else None), None
        self.runner.kick()  # what stands in the ring already

    def next_available(self) -> Sequence[int]:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        return () if self._queue is None else (self._queue.next_available,)

    def check_config(self, config: bytes) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        self._device.check_config(config)

    def flush(self) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        self._device.flush()

    def announce(self) -> None:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`: a disk is on no network."""

    def close(self) -> bool:
        """See :class:`~postcopy.machine.virtio_mmio.Queues`."""
        ended = self.runner.close()
        if ended:
            self._device.close()
        return ended

    # --- requests, on the device's thread

    def _serve(self) -> bool:
        ring = self._ring
        if ring is None:
            return False
        try:
            queue = self._queue = self._queue or self._open_queue(ring)
            if not queue.waiting():
                return False
            chain = queue.take()
            self._check(chain)
            written = self._device.handle(self._memory, chain)
            queue.complete(chain.head, written)
            wants_interrupt = queue.wants_interrupt()
        except RingError as error:
            self._broken(error)
            self._ring = None
            return False
        except KernelError as error:
            self._on_lost(f"a request to the drive touches a page that is lost: {error}")
            return False
        except Exception as error:
            _log.exception("the drive cannot go on")
            self._on_lost(f"the drive cannot go on: {type(error).__name__}: {error}")
            return False
        if wants_interrupt:
            self._interrupt(REQUEST_DONE)
        return True

    def _check(self, chain: Chain) -> None:
        buffers = (*chain.readable, *chain.writable)
        total = sum(buffer.length for buffer in buffers)
        if total > _MOST_BYTES:  # the device copies it
            raise RingError(f"a request of {total} bytes; {_MOST_BYTES >> 20} MiB are possible")
        for buffer in buffers:
            self._memory.check(buffer.address, buffer.length)

    def _open_queue(self, ring: RingState) -> SplitQueue:
        memory = self._memory
        check_size(ring.entries)
        layout = RingLayout(ring.entries)
        return SplitQueue(
            ring.entries,
            memory.area(ring.descriptors, layout.descriptors_bytes, 16),
            memory.area(ring.available, layout.available_bytes, 2),
            memory.area(ring.used, layout.used_bytes, 4),
            next_available=ring.next_available,
        )

    def _awaited(self) -> str:
        address = self._memory.waits_at
        if address is None:
            return "a request to its file; see what the host's disk does, and stop the guest then"
        return f"the guest's page at {address & -_PAGE_BYTES:#x} {NOT_COME}"
