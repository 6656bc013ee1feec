"""The push begins with little, and holds back while the guest asks for its first pages."""

import threading
from unittest import mock

import numpy as np
import pytest

from fakes.waiting import wait_until
from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.memory.ram_block import RamBlock
from postcopy.source import push as pushing
from postcopy.source.counters import Counters, Rate
from postcopy.source.dirty_pages import DirtyPages
from postcopy.source.flow_control import PushPolicy
from postcopy.source.push import PostcopyPush

PAGES = 1024  # less than the window
DEADLINE_S = 60.0
POLICY = PushPolicy(begin_s=DEADLINE_S, quiet_s=DEADLINE_S)
FIRST_PAGES = POLICY.first_batch_bytes // 4096


class Sent:
    """A sender that only notes."""

    limit = 0

    def __init__(self):
        self.batches = []
        self.rate = Rate()

    def send(self, pages, batch, between=None):
        self.batches.append(batch)
        return len(batch) * 4096

    def send_command(self, command):
        pass

    def pace(self, interrupt):
        pass


@pytest.fixture
def block():
    made = RamBlock(Region("ram", PAGES * 4096, 4096, 0, 1 << 40, memfd.create("t", PAGES * 4096)))
    made.pages[:, 0] = 1
    yield made
    made.close()


def test_until_the_guest_has_begun_only_a_few_pages_and_those_it_asks_for(block, monkeypatch):
    clock = mock.Mock(monotonic=mock.Mock(return_value=0.0))
    monkeypatch.setattr(pushing, "time", clock)
    sent = Sent()
    push = PostcopyPush(DirtyPages([block], None), sent, Counters(), POLICY)
    push.begin()
    thread = threading.Thread(target=push.run, args=(None,))
    thread.start()
    wait_until(lambda: sent.batches)
    push.serve("ram", 500 * 4096, 4096)
    assert [batch.tolist() for batch in sent.batches] == [list(range(FIRST_PAGES)), [500]]

    def has_gone_on():
        clock.monotonic.return_value += DEADLINE_S + 1
        push.serve("ram", 500 * 4096, 4096)  # which is on its way already
        return not thread.is_alive()

    wait_until(has_gone_on)
    push.stop()
    assert sent.batches[2][0] == 501  # it goes on from there
    assert sorted(np.concatenate(sent.batches).tolist()) == list(range(PAGES))
