"""The rounds of precopy with a tracker and a sender that only pretend."""

import numpy as np
import pytest

from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.memory.ram_block import RamBlock
from postcopy.parameters import Parameters
from postcopy.source.counters import Counters, Rate
from postcopy.source.dirty_pages import DirtyPages
from postcopy.source.orders import Orders
from postcopy.source.precopy import Outcome, Precopy

PAGES = 1024


class ScriptedTracker:
    """Tells of the writes of one script entry a round; ``None`` is a guest that has stopped."""

    def __init__(self, *script):
        self._script = list(script)
        self._now = np.zeros(PAGES, np.bool_)
        self.stopped = False

    def start(self):
        self._now[:] = True

    def collect(self, block, start, end, *, protect):
        found = self._now[start:end].copy()
        if protect:
            self._now[start:end] = False
            if end == PAGES:
                self._now[self._script.pop(0) if self._script else []] = True
        return found

    def stop(self):
        self.stopped = True


class NotingSender:
    """Notes what is sent; a mebibyte a second."""

    def __init__(self, after=lambda _: None):
        self.sent = []
        self.rate = Rate()
        self.rate.bytes_per_second = 1 << 20
        self._after = after

    def send(self, pages, batch, behind=b""):
        self.sent.append(batch.tolist())
        self._after(self)

    def pace(self, interrupt):
        pass

    @property
    def pages(self):
        return [page for batch in self.sent for page in batch]


@pytest.fixture
def block():
    made = RamBlock(Region("ram", PAGES * 4096, 4096, 0, 1 << 40, memfd.create("t", PAGES * 4096)))
    made.pages[:, 0] = 1  # no holes
    yield made
    made.close()


def begin(block, tracker, sender, orders=None, **parameters):
    dirty = DirtyPages([block], tracker)
    dirty.start()
    passes = []
    values = Parameters().with_changes({k.replace("_", "-"): v for k, v in parameters.items()})
    orders = orders or Orders()
    precopy = Precopy(dirty, sender, Counters(), orders, lambda: values, passes.append)
    return precopy.run(), passes, dirty


def test_an_idle_guest_takes_one_round(block):
    sender = NotingSender()
    outcome, passes, dirty = begin(block, ScriptedTracker(), sender)
    assert outcome is Outcome.SMALL_ENOUGH
    assert sender.pages == list(range(PAGES))
    assert passes == [2]
    assert dirty.remaining_bytes == 0


def test_what_is_written_again_is_sent_again(block):
    sender = NotingSender()
    hot = list(range(100, 200))
    # 100 pages are more than a mebibyte a second carries in 300 ms; 50 are not.
    tracker = ScriptedTracker(hot, hot, hot[:50])
    outcome, passes, dirty = begin(block, tracker, sender)
    assert outcome is Outcome.SMALL_ENOUGH
    assert sender.pages == [*range(PAGES), *hot, *hot]
    assert passes == [2, 3, 4]
    assert dirty.remaining_bytes == 50 * 4096
    assert dirty.collect_all() == 50 * 4096
    assert np.flatnonzero(dirty.blocks[0].pending).tolist() == hot[:50]
    assert dirty.syncs == 5


def test_the_downtime_allowed_decides(block):
    hot = list(range(100))
    for limit_ms, rounds in ((0, 3), (390, 2), (400, 1)):
        sender = NotingSender()
        outcome, passes, _ = begin(
            block, ScriptedTracker(hot, hot[:99]), sender, downtime_limit=limit_ms
        )
        assert outcome is Outcome.SMALL_ENOUGH
        assert len(passes) == rounds, limit_ms


def test_the_bandwidth_that_the_user_knows_counts(block):
    sender = NotingSender()
    tracker = ScriptedTracker(list(range(1000)))
    outcome, passes, _ = begin(block, tracker, sender, avail_switchover_bandwidth=1 << 30)
    assert outcome is Outcome.SMALL_ENOUGH
    assert passes == [2]


@pytest.mark.parametrize(
    ("order", "outcome"), [("postcopy", Outcome.POSTCOPY), ("cancel", Outcome.CANCELLED)]
)
@pytest.mark.parametrize("batches", [0, 1, 3, 5])
def test_an_order_ends_the_round_at_the_next_batch(block, order, outcome, batches):
    orders = Orders()

    def give(sender):
        if len(sender.sent) >= batches:
            getattr(orders, order)()

    sender = NotingSender(give)
    if not batches:
        give(sender)
    tracker = ScriptedTracker(*[list(range(PAGES))] * 3)
    found, _, dirty = begin(block, tracker, sender, orders, downtime_limit=0)
    assert found is outcome
    assert len(sender.sent) == batches
    # Nothing is lost: what was not sent is pending still.
    dirty.collect_all()
    pending = np.flatnonzero(dirty.blocks[0].pending).tolist()
    assert set(pending) | set(sender.pages) == set(range(PAGES))
