"""Memory mapped into this process, and the only way to touch what may be missing.

Python code that touches a missing page waits for it *holding the interpreter lock*; if the pager is
a thread of the same process, it never gets to run, and all hangs.  :meth:`Mapping.read` and
:meth:`Mapping.write` let go of the lock while they touch memory.  :meth:`Mapping.view` does not,
and is for memory that no userfaultfd watches in this process.
"""

import ctypes
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self, TypeAlias, Union

from postcopy.abi import linux
from postcopy.kernel import calls, patience

_PAGE_BYTES = 4096  # mincore's unit on x86, whatever the mapping's own page size is
_WORD_BYTES = 8

if TYPE_CHECKING:  # numpy takes long to import, and a restored guest does not run before that
    import numpy as np
    import numpy.typing as npt

Buffer: TypeAlias = Union[bytes, bytearray, memoryview, "npt.NDArray[np.uint8]"]


class Mapping:
    """A range of this process's memory.

    :param address: as ``mmap`` gave it; the mapping belongs to this object from now on.
    """

    def __init__(self, address: int, length_bytes: int) -> None:
        self._address = address
        self._length = length_bytes
        self._viewed: weakref.ref[ctypes.Array[ctypes.c_uint8]] | None = None
        self._closed = False

    @classmethod
    def shared(
        cls, fd: int, length_bytes: int, offset: int = 0, *, writable: bool = True
    ) -> "Mapping":
        """Map a file's bytes; writes go to the file.  The descriptor may be closed afterwards.

        :param offset: in the file, a multiple of its page size.
        :raises KernelError: ``ENOMEM`` if huge pages are short.
        """
        protection = linux.PROT_READ | (linux.PROT_WRITE if writable else 0)
        return cls(calls.mmap(length_bytes, protection, linux.MAP_SHARED, fd, offset), length_bytes)

    @classmethod
    def joined(cls, files: Sequence[tuple[int, int]], alignment_bytes: int) -> "Mapping":
        """Map whole files one behind the other; writes go to the files, which may be closed afterwards.

        :param files: descriptor and length in bytes of each, in whole pages of the file's own size.
        :param alignment_bytes: of the address: the largest of those page sizes, or more.
        :raises KernelError: ``ENOMEM`` if huge pages are short.
        """
        length = sum(size for _, size in files)
        flags = linux.MAP_PRIVATE | linux.MAP_ANONYMOUS | linux.MAP_NORESERVE
        room = calls.mmap(length + alignment_bytes, linux.PROT_NONE, flags)
        address = -(-room // alignment_bytes) * alignment_bytes
        if address > room:
            calls.munmap(room, address - room)
        calls.munmap(address + length, room + alignment_bytes - address)
        made, at = cls(address, length), address
        try:
            for fd, size in files:
                protection = linux.PROT_READ | linux.PROT_WRITE
                calls.mmap(size, protection, linux.MAP_SHARED | linux.MAP_FIXED, fd, at=at)
                at += size
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def anonymous(cls, length_bytes: int) -> "Mapping":
        """Map private memory that is all zeros and takes no room until it is touched."""
        flags = linux.MAP_PRIVATE | linux.MAP_ANONYMOUS | linux.MAP_NORESERVE
        return cls(
            calls.mmap(length_bytes, linux.PROT_READ | linux.PROT_WRITE, flags), length_bytes
        )

    @property
    def address(self) -> int:
        """Where the mapping begins in this process."""
        return self._address

    @property
    def length(self) -> int:
        """Bytes mapped."""
        return self._length

    def read(self, offset: int, length_bytes: int) -> bytes:
        """Copy bytes out; waits for missing pages without holding the interpreter lock.

        :raises ValueError: the range is not inside the mapping, or the mapping is closed.
        :raises KernelError: ``EFAULT``: a page of it is lost (poisoned).
        """
        address = self._checked(offset, length_bytes)
        # Not ctypes.string_at(): that keeps the lock.
        buffer = ctypes.create_string_buffer(length_bytes)
        calls.read_memory(address, ctypes.addressof(buffer), length_bytes)
        return buffer.raw

    def write(self, offset: int, data: Buffer) -> None:
        """Copy bytes in; waits for missing pages without holding the interpreter lock.

        :param data: contiguous, of this process's ordinary memory.
        :raises ValueError: the range is not inside the mapping, or the mapping is closed.
        :raises KernelError: ``EFAULT``: a page of it is lost (poisoned), or not writable.
        """
        if isinstance(data, bytes):
            address = self._checked(offset, len(data))
            source = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p)
            calls.write_memory(address, source.value or 0, len(data))
            return
        import numpy as np

        array = np.frombuffer(data, np.uint8)
        address = self._checked(offset, array.size)
        calls.write_memory(address, array.ctypes.data, array.size)

    def load(self, offset: int, length_bytes: int) -> int:
        """Read an aligned little-endian number of 2, 4 or 8 bytes, never half of it; see :meth:`read`."""
        self.read(offset, length_bytes)
        # The whole word that it is in: the C library takes two accesses for two bytes, and the second may
        # see what the first does not.
        word = ctypes.create_string_buffer(_WORD_BYTES)
        before = offset % _WORD_BYTES
        calls.copy_number(ctypes.addressof(word), self._address + offset - before, _WORD_BYTES)
        return int.from_bytes(word.raw[before : before + length_bytes], "little")

    def store(self, offset: int, value: int, length_bytes: int) -> None:
        """Write such a number: a vCPU sees the old one or the new one; see :meth:`write`."""
        self.read(offset, length_bytes)
        number = ctypes.create_string_buffer(value.to_bytes(length_bytes, "little"), length_bytes)
        calls.copy_number(self._address + offset, ctypes.addressof(number), length_bytes)

    def view(self) -> "npt.NDArray[np.uint8]":
        """The whole mapping as an array of bytes; see :meth:`buffer`."""
        import numpy as np

        return np.frombuffer(self.buffer(), np.uint8)

    def buffer(self) -> memoryview:
        """The whole mapping as bytes.

        Only for memory that no userfaultfd watches in this process, or where no other Python thread is
        needed: touching a missing page through it stops every Python thread.  The memory stays mapped
        until the last view is gone, even if :meth:`close` is called before.

        :raises ValueError: the mapping is closed.
        """
        address = self._checked(0, self._length)
        exported = self._viewed() if self._viewed is not None else None
        if exported is None:
            exported = (ctypes.c_uint8 * self._length).from_address(address)
            self._viewed = weakref.ref(exported)
        return memoryview(exported).cast("B")

    def resident(self, offset: int = 0, length_bytes: int | None = None) -> "npt.NDArray[np.bool_]":
        """Which pages are in memory: one element per 4 KiB, of all or of a part.

        For shared memory that means in the file, from whichever process; for anonymous memory,
        mapped here.  (``mincore(2)``.)
        """
        import numpy as np

        length = self._length - offset if length_bytes is None else length_bytes
        address = self._checked(offset, length)
        result = np.empty(-(-length // _PAGE_BYTES), np.uint8)
        calls.mincore(address, length, result.ctypes.data)
        return (result & 1).astype(np.bool_)

    def populate(self, offset: int, length_bytes: int) -> None:
        """Bring pages into memory, writable, keeping what they hold (``MADV_POPULATE_WRITE``).

        Where a userfaultfd watches, this waits for missing pages as a write would, without holding
        the interpreter lock.

        :raises KernelError: ``ENOMEM`` if the host has not so much memory.
        """
        address = self._checked(offset, length_bytes)
        # Whether there is so much memory is the question.
        calls.madvise(address, length_bytes, linux.MADV_POPULATE_WRITE, passes=patience.SIGNALS)

    def discard(self, offset: int, length_bytes: int) -> None:
        """Forget pages (``MADV_DONTNEED``).

        Anonymous pages are gone and fault as missing.  Shared pages are only unmapped here and keep
        their contents: :func:`postcopy.kernel.memfd.punch_hole` is what empties them.
        """
        address = self._checked(offset, length_bytes)
        calls.madvise(address, length_bytes, linux.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap, now or when the last :meth:`view` is gone.  Harmless when closed."""
        if self._closed:
            return
        self._closed = True
        exported = self._viewed() if self._viewed is not None else None
        if exported is None:
            calls.munmap(self._address, self._length)
            return
        # A view into unmapped memory would end the process at its next use, so the view wins.
        last = weakref.finalize(exported, calls.munmap, self._address, self._length)
        last.atexit = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, offset: int, length_bytes: int) -> int:
        if self._closed:
            raise ValueError("the mapping is closed")
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self._length:
            end = offset + length_bytes
            raise ValueError(f"[{offset:#x}, {end:#x}) is not inside {self._length:#x} bytes")
        return self._address + offset
