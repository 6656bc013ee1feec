"""A restore serves the faults of every process that has the guest's memory mapped."""

import threading

import numpy as np
import pytest

from fakes.cpus import CpusNoted
from fakes.elsewhere import Elsewhere
from fakes.guest import RAM, FakeGuest
from lazy_restore.test_restore_pager import PAGE, PAGES, FakeSource
from postcopy.channel.rate_limit import RateLimiter
from postcopy.errors import KernelError
from postcopy.lazy_restore import restore_pager
from postcopy.lazy_restore.block_restorer import BlockRestorer
from postcopy.lazy_restore.restore_pager import Pace, RestorePager
from postcopy.memory.page_map import RECEIVED
from postcopy.paging.shared_space import SharedSpaces

pytestmark = pytest.mark.userfaultfd

ZERO, LOST = 7, 40


class Scene:
    """Memory in two address spaces, and a pager that fills it with what is touched, and nothing else."""

    def __init__(self):
        self.guest = FakeGuest(PAGES * PAGE)
        self.ram = self.guest.incoming_ram()
        self.paged = self.ram[RAM]
        self.userfaultfd = self.guest.open_userfaultfd()
        self.elsewhere = Elsewhere(self.guest, 0, PAGES)
        self.shared = SharedSpaces(self.ram)
        self.shared.add(self.elsewhere.space)
        self.lost = []
        source = FakeSource(zero=[ZERO], bad=[LOST])
        self.restorer = BlockRestorer(self.userfaultfd, self.paged, source, self.lost.append)
        self.pager = RestorePager(
            self.userfaultfd,
            [self.restorer],
            {RAM: np.zeros(PAGES, np.bool_)},
            Pace(RateLimiter(1), holds_for_recording=True),
            shared=self.shared,
        )
        self.thread = threading.Thread(target=self.pager.run, daemon=True)
        self.thread.start()

    def close(self):
        self.pager.stop()
        self.thread.join(10)
        self.pager.close()
        self.elsewhere.close()
        self.shared.close()
        self.guest.unwatch_missing()
        self.userfaultfd.close()
        self.ram.close()
        self.guest.close()


@pytest.fixture
def scene(monkeypatch):
    monkeypatch.setattr(restore_pager, "CpusAwake", CpusNoted)
    made = Scene()
    yield made
    made.close()


def number(touched):
    return int.from_bytes(touched, "little")


@pytest.mark.parametrize("first", ["elsewhere", "guest"])
def test_what_is_touched_in_either_comes_for_both(scene, first):
    order = [scene.elsewhere, scene.guest]
    for toucher in order if first == "elsewhere" else order[::-1]:
        assert [number(toucher.touch(page)) for page in (9, 200, ZERO)] == [10, 201, 0]
    assert (scene.paged.pages.states[[9, 200, ZERO]] == RECEIVED).all()
    assert scene.lost == []


def test_what_is_written_elsewhere_stays(scene):
    scene.elsewhere.memory.write(9 * PAGE, b"\xff" * 8)
    scene.elsewhere.memory.write(ZERO * PAGE, b"\xff" * 8)
    assert [scene.guest.touch(page) for page in (9, ZERO)] == [b"\xff" * 8] * 2


@pytest.mark.parametrize("first", ["elsewhere", "guest"])
def test_a_lost_page_is_lost_for_both(scene, first):
    order = [scene.elsewhere, scene.guest]
    for toucher in order if first == "elsewhere" else order[::-1]:
        for page in (LOST, LOST + 1):
            with pytest.raises(KernelError, match=r"EFAULT|Bad address"):
                toucher.touch(page)
    assert sum(each.pages for each in scene.lost) == 4


def test_a_page_that_the_guest_has_removed_is_zero_for_both(scene):
    scene.restorer.remove(100, 101)
    assert number(scene.elsewhere.touch(100)) == 0
    assert number(scene.guest.touch(100)) == 0
