"""Checks each chunk of a mapped image once, before its first page is served."""

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from postcopy.image.base import PageRows
from postcopy.image.digests import CHUNK_BYTES, complaint
from postcopy.image.file import WRONG_DIGEST, Damage
from postcopy.image.manifest import Manifest
from postcopy.image.mapped_ram import MappedImage
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Indices, Mask

_MANY_PAGES = CHUNK_BYTES // TARGET_PAGE_BYTES // 2
_UNKNOWN, _GOOD, _BAD = 0, 1, 2


class ChunkVerifier:
    """Compares chunks of the file with the manifest, and keeps the verdicts.

    For any thread.  Two threads that need the same chunk at once both check it, with the same result; so
    verdicts need no lock, and a thread with a demand never waits for the check of another thread.
    """

    def __init__(self, image: MappedImage, manifest: Manifest) -> None:
        self._image = image
        self._manifest = manifest
        self._verdicts: npt.NDArray[np.uint8] = np.zeros(len(manifest.digests.present), np.uint8)
        self._telling = threading.Lock()
        self._damages: list[Damage] = []

    def good(self, block_name: str, first_page: int, count: int) -> Mask:
        """Return which of these pages may be served; shape ``(count,)``.

        :raises KeyError: there is no such block.
        """
        place = self._image.place(block_name)
        start = place.pages_offset + first_page * TARGET_PAGE_BYTES
        first = start // CHUNK_BYTES
        end = -(-(start + count * TARGET_PAGE_BYTES) // CHUNK_BYTES)
        for chunk in (first + np.flatnonzero(self._verdicts[first:end] == _UNKNOWN)).tolist():
            if self._verdicts[chunk] == _UNKNOWN:  # still: other threads check, too
                self._check(chunk)
        chunks = (start + np.arange(count, dtype=np.int64) * TARGET_PAGE_BYTES) // CHUNK_BYTES
        good: Mask = self._verdicts[chunks] == _GOOD
        return good

    def read(self, block_name: str, wanted: Indices) -> tuple[PageRows, Mask]:
        """Read pages that lie near to each other and check them, from one copy of their bytes.

        :param wanted: pages of 4096 bytes, ascending, at least one.
        :return: all pages from the first to the last of ``wanted``, shape ``(n, 4096)``; and which of
            ``wanted`` may be served.
        :raises KeyError: there is no such block.
        :raises ImageError: some of the bytes cannot be read, perhaps such as lie between those pages.
        """
        offsets = self._image.place(block_name).pages_offset + wanted * TARGET_PAGE_BYTES
        chunks = offsets // CHUNK_BYTES
        new = np.unique(chunks[self._verdicts[chunks] == _UNKNOWN])
        first = start = int(offsets[0])
        last = end = int(offsets[-1]) + TARGET_PAGE_BYTES
        if len(new):
            start = min(start, int(new[0]) * CHUNK_BYTES)
            end = max(end, min((int(new[-1]) + 1) * CHUNK_BYTES, self._image.file.size_bytes))
        data = np.empty(end - start, np.uint8)
        self._image.file.read_into(start, data)
        if len(new):
            wrong = self._manifest.digests.wrong(new, data, start)
            self._verdicts[np.setdiff1d(new, wrong, assume_unique=True)] = _GOOD
            for chunk in wrong:
                self._note_damage(chunk, WRONG_DIGEST)
        good: Mask = self._verdicts[chunks] == _GOOD
        return data[first - start : last - start].reshape(-1, TARGET_PAGE_BYTES), good

    def is_good(self, block_name: str, page: int) -> bool:
        """Return whether this page may be served: the fast path for a page that a vCPU waits for."""
        offset = self._image.place(block_name).pages_offset + page * TARGET_PAGE_BYTES
        chunk = offset // CHUNK_BYTES
        if self._verdicts[chunk] == _UNKNOWN:
            self._check(chunk)
        return bool(self._verdicts[chunk] == _GOOD)

    def look_ahead(self, block_name: str, wanted: Mask, ended: Callable[[], bool]) -> None:
        """Check chunks ahead of :meth:`good`, from the first one on.

        Only chunks with many wanted pages: single pages are placed in calls so short that two threads
        would spend their time waiting for the interpreter.

        :param wanted: the pages that will be needed; shape ``(pages of the block,)``.
        :param ended: whether to stop.
        """
        start = self._image.place(block_name).pages_offset
        pages_of = np.bincount((start + np.flatnonzero(wanted) * TARGET_PAGE_BYTES) // CHUNK_BYTES)
        for chunk in np.flatnonzero(pages_of >= _MANY_PAGES).tolist():
            if ended():
                return
            if self._verdicts[chunk] == _UNKNOWN:
                self._check(chunk)

    def damages(self) -> list[Damage]:
        """Damage that has been found so far, in the order of finding."""
        with self._telling:
            return list(self._damages)

    def _check(self, chunk: int) -> None:
        reason = complaint(self._image.file, self._manifest.digests, chunk)
        if reason is None:
            self._verdicts[chunk] = _GOOD
        else:
            self._note_damage(chunk, reason)

    def _note_damage(self, chunk: int, reason: str) -> None:
        start = chunk * CHUNK_BYTES
        end = min(start + CHUNK_BYTES, self._image.file.size_bytes)
        block, offset = self._image.locate(start, end) or (None, None)
        with self._telling:
            if self._verdicts[chunk] != _BAD:
                self._verdicts[chunk] = _BAD
                damage = Damage(self._image.path, start, end - start, block, offset, reason)
                self._damages.append(damage)
