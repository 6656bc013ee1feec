"""One ring of a back end: set up by messages, served by its device."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Final

from postcopy.errors import RingError, VhostUserError
from postcopy.vhost_user.device import Device, Request
from postcopy.vhost_user.dirty_log import DirtyLog
from postcopy.vhost_user.memory import GuestMemory, RingArea
from postcopy.vhost_user.payloads import RingAddresses
from postcopy.virtio import ring

BATCH: Final = 64
"""Requests after which a ring lets messages and other rings have their turn."""

_NO_FD: Final = -1
_ONE: Final = (1).to_bytes(8, sys.byteorder)


class Vring:
    """One ring.

    It is served while it has a size, addresses and a kick, and is enabled.  What the driver wrote into it
    wrong stops this ring alone.
    """

    def __init__(
        self, number: int, device: Device, memory: GuestMemory, say: Callable[[str], None]
    ) -> None:
        self.number = number
        self.enabled = False
        self.log: DirtyLog | None = None
        """Where written pages are marked; None: nothing is logged."""
        self.indirect = False
        """Whether indirect descriptors have been agreed on."""
        self._device = device
        self._memory = memory
        self._say = say
        self._size = 0
        self._base = 0
        self._addresses: RingAddresses | None = None
        self._kick = self._call = self._error = _NO_FD
        self._queue: ring.SplitQueue | None = None
        self._broken = False

    @property
    def kick(self) -> int:
        """The eventfd that the driver kicks; -1: there is none yet."""
        return self._kick

    @property
    def is_served(self) -> bool:
        """Whether its requests are to be looked at."""
        return (
            self.enabled
            and self._kick != _NO_FD
            and self._size > 0
            and self._addresses is not None
            and not self._broken
        )

    def set_size(self, size: int) -> None:
        """Set the number of entries.

        :raises RingError: no ring can have so many.
        """
        ring.check_size(size)
        self._size = size
        self.forget_views()

    def set_base(self, index: int) -> None:
        """Go on from this index of the available ring."""
        self._base = index & 0xFFFF
        self.forget_views()

    def set_addresses(self, addresses: RingAddresses) -> None:
        """Set where the ring is.

        :raises VhostUserError: not in memory.
        """
        self._areas(addresses)
        self._addresses = addresses
        self.forget_views()

    def set_kick(self, fd: int) -> None:
        """Take over the eventfd of the driver's kicks."""
        self._kick = _replaced(self._kick, fd)

    def set_call(self, fd: int) -> None:
        """Take over the eventfd of interrupts; -1: the driver polls."""
        self._call = _replaced(self._call, fd)
        _signal(fd)  # a back end before us may have ended between a request's end and its interrupt

    def set_error(self, fd: int) -> None:
        """Take over the eventfd by which the front end is told that the ring is broken; -1: none."""
        self._error = _replaced(self._error, fd)

    def stop(self) -> int:
        """Stop it; return the index of the first request that has not been done."""
        self.set_kick(_NO_FD)
        self.forget_views()
        return self._base

    def forget_views(self) -> None:
        """Look the ring up again: memory, or what is known of the ring, has changed."""
        if self._queue is not None:
            self._base = self._queue.next_available
        self._queue = None
        self._broken = False

    def take_kick(self) -> None:
        """Read the kick, so that it is not ready any more; any descriptor can have been sent as one."""
        try:
            if not os.read(self._kick, 8):
                self._break("its kick has ended")
        except BlockingIOError:
            pass
        except OSError as error:
            self._break(f"its kick cannot be read: {error.strerror}")

    def serve(self) -> bool:
        """Do requests, at most :data:`BATCH`; return whether there are more."""
        try:
            if self._queue is None:
                self._queue = self._looked_up()
            return self._serve(self._queue)
        except RingError as error:
            self._break(str(error))
            return False

    def close(self) -> None:
        """Close its descriptors."""
        self.set_kick(_NO_FD)
        self.set_call(_NO_FD)
        self.set_error(_NO_FD)
        self._queue = None

    def _break(self, why: str) -> None:
        self._broken = True
        self._say(f"ring {self.number}: {why}; it is served again when it is set up anew")
        _signal(self._error)

    def _serve(self, queue: ring.SplitQueue) -> bool:
        count = queue.waiting()
        if not count:
            return False
        for _ in range(min(count, BATCH)):
            self._one(queue)
        self._mark_ring()
        if queue.wants_interrupt():
            _signal(self._call)
        return queue.waiting() > 0

    def _one(self, queue: ring.SplitQueue) -> None:
        chain = queue.take()
        request = Request([], [])
        for address, length in chain.readable:
            self._memory.views(address, length, request.readable)
        for address, length in chain.writable:
            self._memory.views(address, length, request.writable)
        written = self._device.process(self.number, request)
        if self.log is not None:
            # Before the driver can know that it is done.
            for address, length in chain.writable:
                self.log.mark(address, length)
        queue.complete(chain.head, written)

    def _mark_ring(self) -> None:
        addresses = self._addresses
        if self.log is None or addresses is None or not addresses.flags & RingAddresses.LOGGED:
            return
        self.log.mark(addresses.log, ring.RingLayout(self._size).used_bytes)

    def _looked_up(self) -> ring.SplitQueue:
        assert self._addresses is not None
        try:
            areas = self._areas(self._addresses)
        except VhostUserError as error:
            raise RingError(str(error)) from error
        queue = ring.SplitQueue(
            self._size,
            *areas,
            next_available=self._base,
            read_memory=self._memory.read if self.indirect else None,
        )
        # A back end before us may have ended while it wanted no kicks.
        queue.set_notified(notified=True)
        self._mark_ring()
        return queue

    def _areas(self, addresses: RingAddresses) -> tuple[RingArea, RingArea, RingArea]:
        layout, part = ring.RingLayout(self._size), self._memory.part_of_ring
        return (
            part(addresses.descriptors, layout.descriptors_bytes, 16),
            part(addresses.available, layout.available_bytes, 2),
            part(addresses.used, layout.used_bytes, 4),
        )


def _replaced(old: int, new: int) -> int:
    if old != _NO_FD:
        os.close(old)
    return new


def _signal(fd: int) -> None:
    """Tell by an eventfd, or by a pipe; what becomes of it is the other end's business."""
    if fd != _NO_FD:
        with contextlib.suppress(OSError):
            os.write(fd, _ONE)
