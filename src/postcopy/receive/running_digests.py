"""Digests of a file that is being written: taken of the bytes as they arrive, not of the file afterwards.

A chunk has its digest as soon as it has been written from its start to its end, at once or piece by piece.
Any other write makes it *fresh*.  A thread takes the digests of chunks that are no longer fresh after a
quarter of a second from the file: what a guest writes again and again is read once, at the end.
"""

import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from postcopy.image.digests import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    ChunkDigests,
    chunk_count,
    digest,
    is_zero,
)
from postcopy.kernel import threads

_TICK_S: Final = 0.25
_MOST_OPEN: Final = 64
_TAIL_BYTES: Final = 128 << 20
"""Room for what stands behind the pages: devices and their description."""
_THREADS: Final = 2

_TAKEN, _AGED, _FRESH, _READING = 0, 1, 2, 3

Bytes = npt.NDArray[np.uint8]


class RunningDigests:
    """The digests of a file.

    :param pages_end: where what stands behind the pages begins.
    :param lock: held by the caller of :meth:`note` and :meth:`touch` from before the write.
    """

    def __init__(self, fd: int, pages_end: int, lock: threading.Lock) -> None:
        count = chunk_count(pages_end + _TAIL_BYTES)
        self._fd = fd
        self._lock = lock
        # Under the lock.  They take memory only where something has been written.
        self._states = np.zeros(count, np.uint8)
        self._present = np.zeros(count, np.bool_)
        self._found = np.zeros((count, DIGEST_BYTES), np.uint8)
        # Chunks written up to some byte from their start on: where they go on, and the digest so far.
        self._open: OrderedDict[int, tuple[int, Any]] = OrderedDict()
        self._ended = threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="digests", daemon=True)
        self._is_running = threads.start_if_possible(self._thread)

    def of_whole_chunks(self, start: int, data: Bytes) -> Bytes:
        """Take the digests of the chunks that are whole in data about to be written; for any thread.

        :return: shape ``(chunks, 16)``.
        """
        first = -start % CHUNK_BYTES
        count = max(0, (len(data) - first) // CHUNK_BYTES)
        found = np.empty((count, DIGEST_BYTES), np.uint8)
        for number in range(count):
            at = first + number * CHUNK_BYTES
            found[number] = np.frombuffer(digest(data[at : at + CHUNK_BYTES]), np.uint8)
        return found

    def note(self, start: int, data: Bytes, whole: Bytes) -> None:
        """Note a write of data of which no page is zero.

        :param whole: what :meth:`of_whole_chunks` has returned for it.
        """
        first = -(-start // CHUNK_BYTES)
        head = min(first * CHUNK_BYTES - start, len(data))
        if head:
            self._go_on(start, data[:head])
        if head == len(data):
            return
        end = first + len(whole)
        for chunk in range(first, end) if self._open else ():
            self._open.pop(chunk, None)
        self._found[first:end] = whole
        self._present[first:end] = True
        self._states[first:end] = _TAKEN
        rest = data[head + len(whole) * CHUNK_BYTES :]
        if len(rest):
            self._begin(end, rest)

    def touch(self, start: int, size: int) -> None:
        """Note any other write."""
        first, end = start // CHUNK_BYTES, -(-(start + size) // CHUNK_BYTES)
        self._states[first:end] = _FRESH
        for chunk in range(first, end) if self._open else ():
            self._open.pop(chunk, None)

    def _begin(self, chunk: int, data: Bytes) -> None:
        self._states[chunk] = _FRESH
        self._open.pop(chunk, None)
        self._open[chunk] = chunk * CHUNK_BYTES + len(data), blake3(data.data)
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)

    def _go_on(self, start: int, data: Bytes) -> None:
        chunk = start // CHUNK_BYTES
        self._states[chunk] = _FRESH
        at, hasher = self._open.pop(chunk, (-1, None))
        if at != start or hasher is None:
            return
        hasher.update(data.data)
        end = start + len(data)
        if end % CHUNK_BYTES:
            self._open[chunk] = end, hasher
            return
        self._found[chunk] = np.frombuffer(hasher.digest(DIGEST_BYTES), np.uint8)
        self._present[chunk] = True
        self._states[chunk] = _TAKEN

    def finish(self, size_bytes: int) -> ChunkDigests:
        """Take the digests that are still to be taken, and return all of them.

        :param size_bytes: of the file; it is written no more.
        :raises OSError: the file cannot be read.
        """
        self.close()
        if self._failure is not None:
            raise self._failure
        with ThreadPoolExecutor(_THREADS, "digests") as pool:
            for _ in pool.map(self._take, np.flatnonzero(self._states).tolist()):
                pass
        count = chunk_count(size_bytes)
        present = self._present[:count].copy()
        return ChunkDigests.of(size_bytes, present, self._found[:count][present].tobytes())

    def close(self) -> None:
        """End the thread.  Any number of times."""
        self._ended.set()
        if self._is_running:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ended.wait(_TICK_S):
                with self._lock:
                    ready = np.flatnonzero(self._states == _AGED)
                    self._states[self._states == _FRESH] = _AGED
                for chunk in ready.tolist():
                    if self._ended.is_set():
                        return
                    self._take(chunk)
        except OSError as failure:
            self._failure = failure

    def _take(self, chunk: int) -> None:
        """Take one digest from the file, unless the chunk is being written."""
        with self._lock:
            if self._states[chunk] == _FRESH and not self._ended.is_set():
                return
            self._states[chunk] = _READING
            self._open.pop(chunk, None)
        data = os.pread(self._fd, CHUNK_BYTES, chunk * CHUNK_BYTES)
        zero = is_zero(data)
        found = b"" if zero else digest(data)
        with self._lock:
            if self._states[chunk] == _READING:  # and not written meanwhile
                self._states[chunk] = _TAKEN
                self._present[chunk] = not zero
                if not zero:
                    self._found[chunk] = np.frombuffer(found, np.uint8)
