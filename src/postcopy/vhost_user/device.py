"""What a back end is made of: a device, to be derived from; ``docs/vhost_user.md`` has an example."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from postcopy.virtio.block import BlockFeature
from postcopy.virtio.disk import Disk


class Request(NamedTuple):
    """One chain of buffers from the driver: views of guest memory.

    :ivar readable: what the driver has written for the device, in order.
    :ivar writable: room for what the device answers.
    """

    readable: list[memoryview]
    writable: list[memoryview]


class Device(ABC):
    """A virtio device behind vhost-user.  Derive from it, and hand it to :func:`postcopy.vhost_user.serve`.

    Rings, memory, the dirty log and postcopy are not its business.  Each front end is served in a process
    of its own, forked when it connects, so a device may wait as long as it likes: for a disk, or for a
    page of guest memory that has not come yet.
    """

    features: int = 0
    """Feature bits of its kind that it offers; those of rings and of vhost-user are added."""

    queues: int = 1
    """How many rings it has."""

    def configuration(self) -> bytes:
        """Its configuration space, up to 256 bytes."""
        return b""

    def agreed(self, features: int) -> None:  # noqa: B027 - most devices need not know
        """Take note of the feature bits that the driver has agreed on."""

    def reload(self) -> bool:
        """Look anew at what it is made of (``SIGUSR1``); return whether its configuration has changed."""
        return False

    @abstractmethod
    def process(self, queue: int, request: Request) -> int:
        """Do one request.

        :param queue: the number of its ring.
        :return: how many bytes of ``writable`` have been written, from its beginning.
        :raises RingError: it is none; the ring is served no more, until the driver sets it up anew.
        """


class BlockDevice(Device):
    """A raw file as a virtio block device.

    :param queues: how many rings it has; all are served by one thread.
    """

    def __init__(self, disk: Disk, *, queues: int = 1) -> None:
        self._disk = disk
        self.queues = queues
        self.features = int(disk.features | (BlockFeature.MQ if queues > 1 else 0))

    def configuration(self) -> bytes:
        """See :class:`Device`."""
        return self._disk.configuration(queues=self.queues)

    def reload(self) -> bool:
        """Take note of another size of the file."""
        return self._disk.look_at_size()

    def process(self, queue: int, request: Request) -> int:  # noqa: ARG002 - all rings are alike
        """See :class:`Device`."""
        return self._disk.serve(request.readable, request.writable)
