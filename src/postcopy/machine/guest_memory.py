"""Guest memory as a device reaches it: by physical addresses, and with a log of what it has written.

KVM's dirty log has the writes of vCPUs alone.  What a device writes is noted here, behind the write: a
page that is fetched from the log, and sent, before the write has ended, is told of again.
Write-protection and ``PAGEMAP_SCAN`` see these writes by themselves, since they go through the guest's own
mapping.
"""

import threading
from typing import TYPE_CHECKING

from postcopy.errors import Refused, RingError
from postcopy.kernel.mapping import Buffer, Mapping
from postcopy.machine.address_map import AddressMap

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_PAGE_BYTES = 4096
_INDEX_BYTES = 2


class GuestMemory:
    """The RAM of one guest, for one device.

    An access waits for missing pages with no lock held, neither the interpreter's nor one of this object.
    It fails (``KernelError``, ``EFAULT``) at a page that is lost, and is refused where there is no RAM.

    :ivar waits_at: the physical address of the access under way; None: there is none.
    """

    def __init__(self, ram: Mapping, addresses: AddressMap) -> None:
        self._ram = ram
        self._addresses = addresses
        self._lock = threading.Lock()
        self._written: npt.NDArray[np.bool_] | None = None
        self.waits_at: int | None = None

    def check(self, address: int, length_bytes: int) -> None:
        """Refuse what is not all RAM.

        :raises RingError: some of it is not.
        """
        try:
            self._addresses.offset_of(address, length_bytes)
        except Refused as error:
            raise RingError(str(error)) from error

    def area(self, address: int, length_bytes: int, alignment: int) -> "Area":
        """A part of a ring.

        :raises RingError: some of it is not RAM, or it is not aligned.
        """
        self.check(address, length_bytes)
        if address % alignment:
            raise RingError(
                f"a part of the ring at {address:#x} is not aligned to {alignment} bytes"
            )
        return Area(self, address)

    def read(self, address: int, length_bytes: int) -> bytes:
        """Copy bytes out."""
        offset = self._addresses.offset_of(address, length_bytes)
        self.waits_at = address
        data = self._ram.read(offset, length_bytes)
        self.waits_at = None
        return data

    def write(self, address: int, data: Buffer) -> None:
        """Copy bytes in."""
        offset = self._addresses.offset_of(address, len(data))
        self.waits_at = address
        self._ram.write(offset, data)
        self.waits_at = None
        self._note(offset, len(data))

    def load(self, address: int, length_bytes: int) -> int:
        """Read an aligned little-endian number of 2, 4 or 8 bytes, in one access."""
        offset = self._addresses.offset_of(address, length_bytes)
        self.waits_at = address
        value = self._ram.load(offset, length_bytes)
        self.waits_at = None
        return value

    def store(self, address: int, value: int, length_bytes: int) -> None:
        """Write an aligned little-endian number of 2, 4 or 8 bytes, in one access."""
        offset = self._addresses.offset_of(address, length_bytes)
        self.waits_at = address
        self._ram.store(offset, value, length_bytes)
        self.waits_at = None
        self._note(offset, length_bytes)

    # --- the log

    def start_log(self) -> None:
        """Begin with nothing written."""
        import numpy as np

        with self._lock:
            self._written = np.zeros(self._ram.length // _PAGE_BYTES, np.bool_)

    def stop_log(self) -> None:
        """Forget the log; harmless without one."""
        with self._lock:
            self._written = None

    def fetch_log(self, start: int, end: int) -> "npt.NDArray[np.uint8]":
        """Fetch and clear a part of it: one bit a 4 KiB page, the first in bit 0 of byte 0.

        :param start: offsets in RAM of whole blocks: first and end.
        """
        import numpy as np

        with self._lock:
            assert self._written is not None
            written = self._written[start // _PAGE_BYTES : end // _PAGE_BYTES]
            bits = np.packbits(written, bitorder="little")
            written[:] = False
        return bits

    def _note(self, offset: int, length_bytes: int) -> None:
        first, end = offset // _PAGE_BYTES, -(-(offset + length_bytes) // _PAGE_BYTES)
        with self._lock:
            if self._written is not None:
                self._written[first:end] = True


class Area:
    """:class:`postcopy.virtio.ring.Area`: a part of a ring."""

    def __init__(self, memory: GuestMemory, address: int) -> None:
        self._memory = memory
        self._address = address

    def read(self, offset: int, length_bytes: int) -> bytes:
        """Copy bytes out."""
        return self._memory.read(self._address + offset, length_bytes)

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes in."""
        self._memory.write(self._address + offset, data)

    def load(self, offset: int) -> int:
        """Read the ``u16`` at an even offset in one access."""
        return self._memory.load(self._address + offset, _INDEX_BYTES)

    def store(self, offset: int, value: int) -> None:
        """Write the ``u16`` at an even offset in one access."""
        self._memory.store(self._address + offset, value, _INDEX_BYTES)
