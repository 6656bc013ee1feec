"""Random interleavings of what happens to a guest's pages, against a model of what the guest may see.

Each page has a history of its own; the histories of thousands of pages go on together, so that what is
placed in runs comes in runs here.  One thread does everything: the guest's touches are reads that fail
where it would wait (``UFFD_USER_MODE_ONLY``), and other threads' work comes in at the steps of a placement.

A removal is what the kernel makes of ``madvise``: while it begins, nothing can be placed; its event is
read; and some time after that the page is gone.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from postcopy.abi.userfaultfd import EventCode, PagefaultFlag, RegisterMode
from postcopy.errors import KernelError
from postcopy.kernel import calls, memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import MISSING_FEATURES, MISSING_MODE, Userfaultfd

RAM = "ram"


class EngineDies(Exception):
    """Raised at a step of a placement."""


class TellingUserfaultfd(Userfaultfd):
    """As one that was opened for events, which are not left to the kernel here.

    :ivar changing: the address space is: nothing can be placed.
    :ivar step: called before anything is placed.
    """

    changing = False
    step: Callable[[], None] = staticmethod(lambda: None)

    def _request_unless_changing(self, request: Callable[..., int], *arguments: Any) -> int:
        self.tells_of_changes = True
        self.step()
        return 0 if self.changing else request(*arguments)

    def map_existing(self, address, length_bytes):
        return self._request_unless_changing(super().map_existing, address, length_bytes)

    def zeropage(self, address, length_bytes):
        return self._request_unless_changing(super().zeropage, address, length_bytes)

    def copy(self, destination, source, length_bytes):
        return self._request_unless_changing(super().copy, destination, source, length_bytes)


class Memory:
    """The guest's memory, watched, and the model of it.  All arrays are by page, in its own size.

    :param kind: ``anonymous``, ``memfd`` or ``hugetlb``.
    :ivar content: what the guest is to see of a page that has not been removed; -1: it has not come.
    :ivar own: what the guest has written there since; 0: nothing.
    :ivar removed: the event has been read.
    :ivar gone: and the page has been taken away.
    :ivar note: notes in ``content`` what has come.
    """

    note: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, kind: str, pages: int, seed: int) -> None:
        self.kind, self.pages = kind, pages
        self.size = 2 << 20 if kind == "hugetlb" else 4096
        self.random = np.random.default_rng(seed)
        self.fd = -1
        if kind == "anonymous":
            self.mapping = Mapping.anonymous(pages * self.size)
        else:
            huge = self.size if kind == "hugetlb" else None
            self.fd = memfd.create(RAM, pages * self.size, huge_page_size=huge)
            self.mapping = Mapping.shared(self.fd, pages * self.size)
        opened = Userfaultfd.open(MISSING_FEATURES, user_mode_only=True)
        self.userfaultfd = TellingUserfaultfd(opened.fd, MISSING_FEATURES)
        self.userfaultfd.tells_of_changes = True
        mode = RegisterMode.MISSING if kind == "anonymous" else MISSING_MODE
        self.userfaultfd.register(self.mapping.address, pages * self.size, mode)
        self.content = np.full(pages, -1)
        self.own = np.zeros(pages, int)
        self.removed = np.zeros(pages, bool)
        self.gone = np.zeros(pages, bool)
        self.unmapped = np.zeros(pages, bool)
        self.faults = 0

    def some(self, of: "np.ndarray", share: float) -> "np.ndarray":
        """A part of these pages, ascending: single ones and runs."""
        coarse = self.random.random(self.pages // 4 + 1) < share
        chosen = np.repeat(coarse, 4)[: self.pages] & (self.random.random(self.pages) < 0.7)
        return np.flatnonzero(of & (chosen | (self.random.random(self.pages) < share / 4)))

    def remove(self, handler: Any, pages: "np.ndarray") -> None:
        """Their removal begins, and its event is read."""
        self.note()
        for page in pages.tolist():
            start = self.mapping.address + page * self.size
            handler.removed(start, start + self.size)
        self.removed[pages] = True

    def take_away(self, pages: "np.ndarray") -> None:
        """The removal's end."""
        for page in pages.tolist():
            if self.kind == "anonymous":
                self.mapping.discard(page * self.size, self.size)
            else:
                memfd.punch_hole(self.fd, page * self.size, self.size)
        self.gone[pages] = True
        self.own[pages] = 0

    def unmap(self, handler: Any, pages: "np.ndarray") -> None:
        for page in pages.tolist():
            calls.munmap(self.mapping.address + page * self.size, self.size)
        self.unmapped[pages] = True
        self.remove(handler, pages)

    def touch(self, handler: Any, page: int) -> bool:
        """The guest looks at a page, and may write to it; return False if it has to wait for it."""
        for _ in range(3):
            try:
                seen = int.from_bytes(self.mapping.read(page * self.size, 8), "little")
                break
            except KernelError:
                address = self.mapping.address + page * self.size
                fault = (int(EventCode.PAGEFAULT), 0, address, 1)
                if self.kind == "memfd" and self.in_memory(page):
                    fault = (fault[0], int(PagefaultFlag.MINOR), address, 1)
                self.faults += 1
                handler.serve([fault], 0)
                self.note()
                self.userfaultfd.changing = False
        else:
            assert not self.removed[page], f"page {page} was removed, and is not zero"
            return False
        self._check(page, seen)
        if self.random.random() < 0.5:
            self.own[page] = 1000 + page
            self.mapping.write(page * self.size, int(self.own[page]).to_bytes(8, "little"))
        return True

    def in_memory(self, page: int) -> bool:
        return any(
            True for _ in memfd.data_ranges(self.fd, page * self.size, (page + 1) * self.size)
        )

    def _check(self, page: int, seen: int) -> None:
        if self.own[page]:
            allowed = {self.own[page]}
        elif self.gone[page]:
            allowed = {0}
        elif self.removed[page]:
            allowed = {0, max(0, self.content[page])}
        else:
            allowed = {self.content[page]}
        assert seen in allowed, f"page {page} reads {seen}, not {allowed}"

    def close(self) -> None:
        self.userfaultfd.close()
        self.mapping.close()
        if self.fd >= 0:
            os.close(self.fd)
