"""The machine's drive: a file of the host as a virtio block device, or a back end in another process."""

from collections.abc import Callable, Sequence
from typing import Protocol

from postcopy.errors import GuestError
from postcopy.guest import SharingProcess
from postcopy.machine.back_ends import DISK, NET, BackEnds
from postcopy.machine.config import MachineConfig
from postcopy.machine.guest_memory import GuestMemory
from postcopy.machine.request_queue import RequestQueue
from postcopy.machine.vhost_user_device import VhostUserDevice
from postcopy.machine.virtio_mmio import Queues
from postcopy.machine.virtio_state import CONFIG_BYTES, check_capacity
from postcopy.vhost_user.front_end import MemoryPart
from postcopy.virtio.disk import Disk
from postcopy.virtio.ring import Chain, Feature


class Drive:
    """:class:`postcopy.machine.request_queue.Device` over a file; one thread at a time uses it.

    What the guest writes is in the host's cache; a flush, the guest's or ours, brings it to the disk.

    :raises Refused: the file cannot be a disk.
    """

    device_id = 2

    def __init__(self, path: str) -> None:
        self._disk = Disk(path)
        self.features = int(self._disk.features) | int(Feature.VERSION_1)
        self.config = self._disk.configuration()[:CONFIG_BYTES]

    def check_config(self, config: bytes) -> None:
        """Refuse the configuration space of another disk.

        :raises GuestError: it has another size.
        """
        check_capacity(config, str(self._disk.path), self._disk.sectors)

    def handle(self, memory: GuestMemory, chain: Chain) -> int:
        """Do one request and return how many bytes were written to the guest's memory.

        :raises RingError: it is no request of a block device.
        :raises KernelError: a page of it is lost.
        """
        # Copies: a call for the file that waits for a page of the guest would hold the file's lock, and
        # Python code that touches such a page holds the interpreter's.
        readable = [memoryview(memory.read(each.address, each.length)) for each in chain.readable]
        writable = [memoryview(bytearray(each.length)) for each in chain.writable]
        written = self._disk.serve(readable, writable)
        left = written - 1
        for buffer, piece in zip(chain.writable, writable, strict=True):
            data = bytes(piece[:left])
            memory.write(buffer.address, data)
            left -= len(data)
        last = chain.writable[-1]
        memory.write(last.address + last.length - 1, bytes(writable[-1][-1:]))
        return written

    def flush(self) -> None:
        """Bring to the disk what has been written.

        :raises GuestError: that fails.
        """
        try:
            self._disk.flush()
        except OSError as error:
            raise GuestError(
                f"{self._disk.path}: what the guest has written cannot be brought to the disk: "
                f"{error.strerror}"
            ) from error

    def close(self) -> None:
        """No request comes any more."""
        self._disk.close()


class Sharer(Protocol):
    """What has memory that a back end maps: a machine."""

    def share(self, process: SharingProcess) -> None:
        """See :meth:`postcopy.machine.machine.Machine.share`."""

    def unshare(self, process: SharingProcess) -> None:
        """See :meth:`postcopy.machine.machine.Machine.unshare`."""


def open_device(
    config: MachineConfig,
    memory: GuestMemory,
    parts: Sequence[MemoryPart],
    sharer: Sharer,
    on_lost: Callable[[str], None],
) -> Queues | None:
    """The virtio device that a machine is to have; None: it has none.

    :param parts: the guest's memory, for a back end in another process.
    :param on_lost: gets the reason why the guest cannot go on.
    :raises Refused: it cannot be.
    """
    for kind, path in ((DISK, config.vhost_user_blk), (NET, config.vhost_user_net)):
        if path is not None:
            back_ends = BackEnds(kind, path, parts, sharer.share, sharer.unshare)
            return VhostUserDevice(memory, back_ends, on_lost)
    if config.drive is not None:
        return RequestQueue(Drive(config.drive), memory, on_lost)
    return None
