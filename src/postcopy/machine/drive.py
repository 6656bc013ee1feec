"""The machine's drive: a file of the host as a virtio block device."""

from typing import Final

from postcopy.errors import GuestError
from postcopy.machine.guest_memory import GuestMemory
from postcopy.virtio.disk import Disk
from postcopy.virtio.ring import Chain, Feature

_CONFIG_BYTES: Final = 57
"""As QEMU has it; what follows belongs to features that are not offered."""


class Drive:
    """:class:`postcopy.machine.virtio_mmio.Device` over a file; one thread at a time uses it.

    What the guest writes is in the host's cache; a flush, the guest's or ours, brings it to the disk.

    :raises Refused: the file cannot be a disk.
    """

    device_id = 2

    def __init__(self, path: str) -> None:
        self._disk = Disk(path)
        self.features = int(self._disk.features) | int(Feature.VERSION_1)
        self.config = self._disk.configuration()[:_CONFIG_BYTES]

    def check_config(self, config: bytes) -> None:
        """Refuse the configuration space of another disk.

        :raises GuestError: it has another size.
        """
        sectors = int.from_bytes(config[:8], "little")
        if sectors != self._disk.sectors:
            raise GuestError(
                f"the guest's drive has {sectors} sectors, {self._disk.path} has {self._disk.sectors}; "
                "give both sides the same disk (--drive)"
            )

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
