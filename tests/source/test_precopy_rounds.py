"""The rounds of precopy with a tracker and a sender that only pretend."""

import itertools

import numpy as np
import pytest

from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.memory.ram_block import RamBlock
from postcopy.parameters import Parameters
from postcopy.source.counters import Counters, Rate, RedirtyEstimate
from postcopy.source.dirty_pages import DirtyPages
from postcopy.source.precopy import Outcome, Precopy
from postcopy.source.user_requests import UserRequests

PAGES = 1024


class ScriptedTracker:
    """Tells of the writes of one script entry a round; ``None`` is a guest that has stopped."""

    is_quick = False

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
        return 0

    def end_of_round(self):
        pass

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


def begin(block, tracker, sender, requests=None, **parameters):
    dirty = DirtyPages([block], tracker)
    dirty.start()
    passes = []
    values = Parameters().with_changes({k.replace("_", "-"): v for k, v in parameters.items()})
    requests = requests or UserRequests()
    precopy = Precopy(dirty, sender, Counters(), requests, lambda: values, passes.append)
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
    requests = UserRequests()

    def give(sender):
        if len(sender.sent) >= batches:
            getattr(requests, order)()

    sender = NotingSender(give)
    if not batches:
        give(sender)
    tracker = ScriptedTracker(*[list(range(PAGES))] * 3)
    found, _, dirty = begin(block, tracker, sender, requests, downtime_limit=0)
    assert found is outcome
    assert len(sender.sent) == batches
    # Nothing is lost: what was not sent is pending still.
    dirty.collect_all()
    pending = np.flatnonzero(dirty.blocks[0].pending).tolist()
    assert set(pending) | set(sender.pages) == set(range(PAGES))


class Watched(NotingSender):
    """Notes the pages said to be left at each batch; each takes so long."""

    def __init__(self, batch_s=0.0):
        super().__init__()
        self.left = []
        self.now_s = 0.0
        self._batch_s = batch_s

    def watch(self, block, tracker):
        """Run all rounds; return the pages said to be left, in one list for each round and its end."""
        self.dirty = DirtyPages([block], tracker)
        self.dirty._redirtied = RedirtyEstimate(lambda: self.now_s)
        self.dirty.start()
        values = Parameters().with_changes({"downtime-limit": 0})
        ends = []

        def on_pass(_):
            self.look()
            ends.append(len(self.left))

        precopy = Precopy(self.dirty, self, Counters(), UserRequests(), lambda: values, on_pass)
        assert precopy.run() is Outcome.SMALL_ENOUGH
        return [self.left[i:j] for i, j in itertools.pairwise([0, *ends])]

    def look(self):
        self.left.append(self.dirty.remaining_bytes // 4096)

    def send(self, pages, batch, behind=b""):
        super().send(pages, batch)
        self.look()
        self.now_s += self._batch_s
        return 0


class HotTracker(ScriptedTracker):
    """The guest writes to some pages again and again, until the second round begins."""

    def __init__(self, pages):
        super().__init__()
        self._hot, self._rounds = pages, 0

    def collect(self, block, start, end, *, protect):
        self._rounds += protect
        if self._rounds <= 1 and not protect:
            self._now[: self._hot] = True
        return super().collect(block, start, end, protect=protect)


def test_what_is_left_of_a_guest_that_writes_on_does_not_jump_at_a_rounds_end(block):
    hot = list(range(300))
    rounds = Watched().watch(block, ScriptedTracker(hot, hot, hot))
    assert rounds[0][-1] == 300
    assert rounds[1:3] == [[300, 300, 300], [300, 300, 300]]
    assert rounds[3][-1] == 0


def test_nor_at_the_end_of_a_long_first_round(block):
    """The tracker is asked meanwhile: what has been written again is left again."""
    (first, second) = Watched(batch_s=1.0).watch(block, HotTracker(200))
    assert first[-2:] == [200, 200]
    assert first == sorted(first, reverse=True)
    assert second[-1] == 0


def test_every_write_known_is_counted_once(block):
    """Postcopy is ordered in the midst of a round, some of which was expected anyway."""
    requests = UserRequests()
    hot = list(range(0, PAGES, 2))
    tracker = ScriptedTracker(hot, hot)
    sender = NotingSender(lambda s: len(s.pages) > PAGES + 100 and requests.postcopy())
    outcome, _, dirty = begin(block, tracker, sender, requests, downtime_limit=0)
    assert outcome is Outcome.POSTCOPY
    dirty.sync()
    assert dirty.remaining_bytes == np.count_nonzero(dirty.blocks[0].pending) * 4096


class QuickTracker(ScriptedTracker):
    """The guest writes to some pages as soon as they are protected, in each of so many rounds."""

    is_quick = True

    def __init__(self, hot, rounds):
        super().__init__()
        self._hot, self._rounds = hot, rounds

    def collect(self, block, start, end, *, protect):
        found = super().collect(block, start, end, protect=protect)
        if protect and self._rounds:
            here = [page for page in self._hot if start <= page < end]
            self._now[here] = True
            self._rounds -= end == PAGES
        return found


def test_what_is_written_before_its_turn_is_not_sent_in_vain(block):
    hot = list(range(100, 200))
    sender = NotingSender()
    outcome, passes, dirty = begin(block, QuickTracker(hot, 1), sender, downtime_limit=0)
    assert outcome is Outcome.SMALL_ENOUGH
    assert sender.pages == [*range(100), *range(200, PAGES), *hot]
    assert passes == [2, 3]
    assert dirty.remaining_bytes == 0


def test_later_rounds_send_what_is_hot(block):
    """Or they would be over at once, and protect it again and again for nothing."""
    hot = list(range(100))
    sender = NotingSender()
    outcome, passes, _ = begin(block, QuickTracker(hot, 3), sender, downtime_limit=0)
    assert outcome is Outcome.SMALL_ENOUGH
    assert sender.pages == [*range(100, PAGES), *hot, *hot, *hot]
    assert passes == [2, 3, 4, 5]


def test_what_is_always_written_again_is_left_for_the_end(block):
    hot = list(range(0, PAGES, 16))
    sender = NotingSender()
    outcome, _, dirty = begin(block, QuickTracker(hot, 99), sender, downtime_limit=500)
    assert outcome is Outcome.SMALL_ENOUGH
    assert sorted(sender.pages) == sorted(set(range(PAGES)) - set(hot))
    assert dirty.remaining_bytes == len(hot) * 4096
    assert dirty.collect_all() == len(hot) * 4096
    assert np.flatnonzero(dirty.blocks[0].pending).tolist() == hot


def test_what_is_held_back_is_counted_once(block):
    hot = list(range(100, 200))
    dirty = DirtyPages([block], QuickTracker(hot, 1))
    dirty.start()
    (pages,) = dirty.blocks
    dirty.collect(pages, 0, PAGES)
    held = dirty.written_again(pages, 0, PAGES)
    assert np.flatnonzero(held).tolist() == hot
    pages.pending[~held] = False
    assert dirty._redirtied_bytes(pages, PAGES) == 0
    assert dirty.remaining_bytes == len(hot) * 4096
