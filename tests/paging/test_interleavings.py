"""After a removal a page is zero and never the old one, whatever comes when: random interleavings."""

import os
from contextlib import nullcontext, suppress

import numpy as np
import pytest
from interleavings import RAM, EngineDies, Memory

from fakes import huge_pages
from fakes.cpus import CpusNoted
from fakes.guest import AskedPages, need_missing_pages
from postcopy.channel.rate_limit import RateLimiter
from postcopy.destination.incoming_ram import discard
from postcopy.guest import Region
from postcopy.kernel.pagemap import PagemapScanner
from postcopy.lazy_restore import restore_pager
from postcopy.lazy_restore.block_restorer import BlockRestorer
from postcopy.lazy_restore.restore_pager import Pace, RestorePager
from postcopy.memory import page_map_file
from postcopy.memory.page_map import RECEIVED, PageMap
from postcopy.memory.ram_block import RamBlock
from postcopy.paging.blocktime import Blocktime
from postcopy.paging.fault_table import FaultTable
from postcopy.paging.pager import Pager
from postcopy.paging.placement import Placement
from postcopy.paging.ram import IncomingBlock, IncomingRam, mapped_pages

SEED = int(os.environ.get("POSTCOPY_SEED", "14"))
TIMES = int(os.environ.get("POSTCOPY_INTERLEAVINGS", "1"))
"""How many times as many histories as usual are tried."""

PAGES = 2048
HUGE_PAGES = 8
STEPS = 12


def rows(memory, pages, values):
    """The pages of the wire that make these pages, and what is in them."""
    per_page = memory.size // 4096
    target = (pages[:, None] * per_page + np.arange(per_page)).reshape(-1)
    data = np.zeros((len(target), 512), np.uint64)
    data[:, 0] = np.repeat(values, per_page)
    return target.astype(np.uint64) * np.uint64(4096), data.view(np.uint8)


class Arriving:
    """A postcopy: pages come from the wire, and a removal may come at each step of a placement."""

    def __init__(self, memory):
        self.memory = memory
        self.ram = IncomingRam([region_of(memory)], [page_map_file.create(memory.pages)])
        self.paged = self.ram[RAM]
        self.coming = values_for(memory)
        memory.note = self.note
        self._precopy()
        self._begin()
        self._watch_steps()

    def _precopy(self):
        """Some pages have come; some of those have been discarded, and are to come again."""
        memory = self.memory
        placement = Placement(self.ram, FaultTable(Blocktime({})))
        early = memory.some(memory.content < 0, 0.5)
        if len(early):
            placement.pages(RAM, *rows(memory, early, 500 + early))
        memory.content[early] = 500 + early
        again = memory.some(memory.content >= 0, 0.4)
        ranges = np.stack((again, np.ones_like(again)), 1).astype(np.uint64) * np.uint64(
            memory.size
        )
        discard(self.ram, RAM, ranges)
        memory.content[again] = -1
        memory.mapping.discard(0, memory.pages * memory.size)  # nothing stays mapped

    def _begin(self):
        table = FaultTable(Blocktime({}))
        self.placement = Placement(self.ram, table)
        self.placement.listen(self.memory.userfaultfd)
        self.handler = Pager(self.memory.userfaultfd, self.ram, table, AskedPages(), CpusNoted())

    def _watch_steps(self):
        self._busy = True  # but while a channel is read: one thread reads events and serves touches
        self.memory.userfaultfd.step = lambda: self._step(0.01)
        pages = self.paged.pages
        for name in ("claim", "claim_run", "complete", "complete_run"):
            setattr(pages, name, self._stepping(getattr(pages, name)))

    def _stepping(self, call):
        def stepping(*arguments):
            self._step(0.3)
            answer = call(*arguments)
            self._step(0.3)
            return answer

        return stepping

    def _step(self, share):
        """What another thread does meanwhile; or the engine dies."""
        memory = self.memory
        if self._busy or memory.random.random() > share:
            return
        self._busy = True
        what = memory.random.integers(0, 8)
        if what == 0:
            memory.take_away(memory.some(memory.removed & ~memory.gone & ~memory.unmapped, 0.5))
        elif what > 1:
            memory.remove(self.handler, memory.some(~memory.removed, 0.02))
        self._busy = False
        if what == 1:
            raise EngineDies

    def bring(self):
        """The source sends pages, some of them twice."""
        self._busy = False
        with suppress(EngineDies):
            self._bring(0.4)
            self._busy = True
            return
        self._busy = True
        self.adopt()

    def _bring(self, share):
        memory = self.memory
        due = memory.some((memory.content < 0) | (memory.random.random(memory.pages) < 0.1), share)
        data, zeros = due[self.coming[due] > 0], due[self.coming[due] == 0]
        if len(data):
            self.placement.pages(RAM, *rows(memory, data, self.coming[data]))
        if len(zeros):
            self.placement.zeros(RAM, rows(memory, zeros, zeros)[0])
        self.note()

    def note(self):
        """What has come is what the guest is to see, unless it came too late."""
        memory = self.memory
        come = (self.paged.pages.states == RECEIVED) & ~memory.removed & (memory.content < 0)
        memory.content[come] = self.coming[come]

    def adopt(self):
        """Another engine goes on."""
        with PagemapScanner(os.getpid()) as scanner:
            self.paged.adopt(mapped_pages(scanner, self.paged.block))
        self.handler.discard()
        self._begin()
        self.note()

    def must_be_there(self, _page):
        """Whether a page must be mapped when all has come: there is no thread that does so here."""
        return False

    def bring_rest(self):
        while (self.memory.content[~self.memory.removed] < 0).any():
            self._bring(4.0)

    def close(self):
        self.handler.discard()
        self.ram.close()


class Source:
    """Pages of an image."""

    def __init__(self, memory, values):
        self._rows = np.zeros((memory.pages, memory.size // 8), np.uint64)
        self._rows[:, 0] = values
        self._size = memory.size
        self.data = values > 0
        self.base = self._rows.ctypes.data

    def has(self, page):
        return bool(self.data[page])

    def has_data(self, first, end):
        return self.data[first:end]

    def is_good(self, _page):
        return True

    def good(self, _page, count):
        return count

    def address(self, page, count):
        return self.base + page * self._size, count


class AnonymousBlock(RamBlock):
    """Private memory of the guest's process, which no file is behind: see :class:`RamBlock`."""

    def __init__(self, memory):
        self.name, self.host_address, self.page_size_bytes = (
            RAM,
            memory.mapping.address,
            memory.size,
        )
        self.size_bytes = memory.pages * memory.size

    def close(self):
        """There is nothing to let go of."""


class Restored:
    """A lazy restore: pages come when they are touched, and in the background."""

    def __init__(self, memory):
        self.memory = memory
        anonymous = memory.kind == "anonymous"
        block = AnonymousBlock(memory) if anonymous else RamBlock(region_of(memory))
        self.paged = IncomingBlock(block, PageMap(page_map_file.create(memory.pages), memory.pages))
        self.coming = values_for(memory)
        self.source = Source(memory, self.coming)
        memory.note = self.note
        memory.userfaultfd.step = self._step
        self._begin()

    def _begin(self):
        restorer = BlockRestorer(self.memory.userfaultfd, self.paged, self.source, pytest.fail)
        self.handler = RestorePager(self.memory.userfaultfd, [restorer], {}, Pace(RateLimiter(0)))
        self.handler.hurry()
        return restorer

    def _step(self):
        memory = self.memory
        if memory.random.random() < 0.01:
            memory.take_away(memory.some(memory.removed & ~memory.gone & ~memory.unmapped, 0.5))

    def bring(self):
        self.handler.step()
        self.note()

    def note(self):
        memory = self.memory
        come = (self.paged.pages.states == RECEIVED) & ~memory.removed & (memory.content < 0)
        memory.content[come] = self.coming[come]

    def adopt(self):
        if self.memory.kind != "anonymous":  # an engine learns from the file what has come
            self.handler.close()
            self._begin().adopt(os.getpid())
            self.note()

    def must_be_there(self, page):
        """Whether a page must be mapped when all has come: nothing brings it afterwards."""
        return self.coming[page] > 0 and not self.memory.removed[page]

    def bring_rest(self):
        while self.handler.due_in_ms() == 0:
            self.handler.step()
        self.note()

    def close(self):
        self.handler.close()
        self.paged.pages.close()
        self.paged.block.close()


def region_of(memory):
    size = memory.pages * memory.size
    return Region(RAM, size, memory.size, 0, memory.mapping.address, os.dup(memory.fd))


def values_for(memory):
    """What the source has: a fifth of the pages are zero."""
    return memory.random.integers(1, 200, memory.pages) * (memory.random.random(memory.pages) < 0.8)


def interleave(subject, memory):
    for _ in range(STEPS):
        memory.userfaultfd.changing = memory.random.random() < 0.1
        what = memory.random.integers(0, 20)
        if what < 8:
            subject.bring()
        elif what < 15:
            for page in memory.some(~memory.unmapped, 0.2).tolist():
                memory.touch(subject.handler, page)
        elif what < 17:
            memory.remove(subject.handler, memory.some(~memory.removed, 0.1))
        elif what < 18:
            memory.take_away(memory.some(memory.removed & ~memory.gone & ~memory.unmapped, 0.5))
        elif what < 19:
            memory.unmap(subject.handler, memory.some(~memory.unmapped, 0.01))
        else:
            subject.adopt()
    memory.userfaultfd.changing = False
    subject.bring_rest()
    for page in np.flatnonzero(~memory.unmapped).tolist():
        before = memory.faults
        assert memory.touch(subject.handler, page), f"page {page} never comes"
        assert memory.faults == before or not subject.must_be_there(page), (
            f"page {page} was left out"
        )


ROUNDS = 5  # of each test
CASES = [
    *[(Arriving, "memfd", PAGES, part) for part in range(4)],
    *[(Restored, "memfd", PAGES, part) for part in range(2)],
    *[(Restored, "anonymous", PAGES, part) for part in range(4)],
    *[
        (subject, "hugetlb", HUGE_PAGES, part)
        for subject in (Arriving, Restored)
        for part in range(4)
    ],
]
assert sum(pages * ROUNDS for *_, pages, _ in CASES) > 100_000


@pytest.fixture(autouse=True)
def _no_cpus(monkeypatch):
    monkeypatch.setattr(restore_pager, "CpusAwake", CpusNoted)


@pytest.mark.parametrize(("subject", "kind", "pages", "part"), CASES)
def test_what_was_removed_is_zero_whatever_comes_when(subject, kind, pages, part):
    need_missing_pages()
    pool = huge_pages.reserved(pages) if kind == "hugetlb" else nullcontext()
    with pool:
        for seed in range(SEED + part, SEED + part + len(CASES) * ROUNDS * TIMES, len(CASES)):
            memory = Memory(kind, pages, seed)
            made = subject(memory)
            try:
                interleave(made, memory)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
            finally:
                made.close()
                memory.close()
