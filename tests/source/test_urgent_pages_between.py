"""An urgent page of 2 MiB goes out over the preempt channel while another is half sent."""

import threading

import pytest

from fakes.waiting import wait_until
from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.memory.ram_block import RamBlock
from postcopy.source.counters import Counters, Rate
from postcopy.source.dirty_pages import DirtyPages
from postcopy.source.flow_control import PushPolicy
from postcopy.source.push import PostcopyPush

HUGE = 2 << 20
PAGES = 3  # less than the window
URGENT = 2
DEADLINE_S = 30.0


class HalfSent:
    """A sink that is in the middle of its first page until it is told to go on."""

    limit = 0

    def __init__(self, order):
        self.rate = Rate()
        self._order = order
        self.is_half = threading.Event()
        self.urgent_begun = threading.Event()

    def send(self, pages, batch, between=None):
        if not self._order:
            self._order.append("half")
            self.is_half.set()
            assert self.urgent_begun.wait(DEADLINE_S)
            if between is None:
                self._order.append("uncut")
            else:
                between()
            self._order.append("rest")
        return len(batch) * HUGE

    def send_command(self, command):
        pass

    def pace(self, interrupt):
        pass


class Urgent:
    """A preempt channel whose page takes as long as the push lets it."""

    sends_end = False

    def __init__(self, order, begun, may_end):
        self._order, self._begun, self._may_end = order, begun, may_end

    def send(self, pages, wanted):
        self._begun.set()
        self._may_end()
        self._order.append(wanted.tolist())


@pytest.fixture
def block():
    region = Region("ram", PAGES * HUGE, HUGE, 0, 1 << 40, memfd.create("t", PAGES * HUGE))
    made = RamBlock(region)
    made.pages[:, 0] = 1
    yield made
    made.close()


def begin(block, policy, may_end=lambda: None):
    """A push that has sent half a page, and a request that is being served."""
    order = []
    sink = HalfSent(order)
    push = PostcopyPush(DirtyPages([block], None), sink, Counters(), policy)
    push.use_preempt_channel(Urgent(order, sink.urgent_begun, may_end))
    push.begin()
    threads = [threading.Thread(target=push.run, args=(None,), daemon=True)]
    threads[0].start()
    assert sink.is_half.wait(DEADLINE_S)
    serve = threading.Thread(target=push.serve, args=("ram", URGENT * HUGE, HUGE), daemon=True)
    serve.start()
    threads.append(serve)
    return push, order, threads


def end(push, threads):
    wait_until(lambda: not any(thread.is_alive() for thread in threads), DEADLINE_S, "the end")
    push.stop()


def test_it_goes_first(block):
    policy = PushPolicy(begin_s=0.0, interrupt_s=DEADLINE_S)
    push, order, threads = begin(block, policy)
    end(push, threads)
    assert order == ["half", [URGENT], "rest"]


def test_for_a_bounded_time(block):
    """A vCPU may wait for the page that is half sent."""
    order_of_rest = threading.Event()
    policy = PushPolicy(begin_s=0.0, interrupt_s=0.0)
    push, order, threads = begin(block, policy, lambda: order_of_rest.wait(DEADLINE_S))
    wait_until(lambda: "rest" in order, DEADLINE_S, "the rest of the page")
    order_of_rest.set()
    end(push, threads)
    assert order == ["half", "rest", [URGENT]]


def test_no_page_is_cut_that_goes_out_in_a_moment(block):
    policy = PushPolicy(begin_s=0.0, interrupt_s=DEADLINE_S, least_batch_bytes=HUGE)
    push, order, threads = begin(block, policy)
    end(push, threads)
    assert "uncut" in order
