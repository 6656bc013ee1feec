"""Pacing, with a clock of our own: how much may go in how long."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.channel.rate_limit import BURST_S, RateLimiter


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self):
        self.now = 1000.0
        self.naps = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def test_no_limit_never_waits(clock):
    limiter = RateLimiter(0, clock, clock.sleep)
    assert limiter.spend(1 << 40) == 0
    assert limiter.wait(1 << 40)
    assert clock.naps == []


def test_a_tenth_of_a_second_is_free_and_then_the_rate_holds(clock):
    limiter = RateLimiter(1000, clock, clock.sleep)
    assert limiter.spend(100) == pytest.approx(0)
    assert limiter.spend(100) == pytest.approx(0.1)
    assert limiter.spend(100) == pytest.approx(0.2)


def test_who_was_idle_for_long_bursts_no_more_than_who_was_idle_for_a_tenth(clock):
    limiter = RateLimiter(1000, clock, clock.sleep)
    clock.now += 3600
    assert limiter.spend(100) == pytest.approx(0, abs=1e-6)
    assert limiter.spend(50) == pytest.approx(0.05)


@given(
    st.integers(1, 1 << 30),
    st.lists(st.tuples(st.integers(0, 1 << 22), st.floats(0, 2)), min_size=1, max_size=30),
)
def test_never_more_than_the_rate_and_one_burst(rate, sends):
    clock = Clock()
    limiter = RateLimiter(rate, clock, clock.sleep)
    begin = clock.now
    sent = 0
    for n_bytes, idle in sends:
        limiter_wait_s = limiter.spend(n_bytes)
        sent += n_bytes
        clock.now += limiter_wait_s + idle
        assert sent <= rate * (clock.now - begin + BURST_S) * 1.000001 + 1


def test_waiting_takes_as_long_as_the_bytes_need(clock):
    limiter = RateLimiter(1000, clock, clock.sleep)
    assert limiter.wait(1100)
    assert clock.now == pytest.approx(1001.0)
    assert max(clock.naps) <= BURST_S


def test_a_new_rate_counts_for_who_already_waits(clock):
    def sleep(seconds):
        clock.sleep(seconds)
        limiter.set_rate(0)

    limiter = RateLimiter(1, clock, sleep)
    assert limiter.wait(1 << 20)
    assert len(clock.naps) == 1


def test_a_debt_is_paid_at_the_new_rate(clock):
    limiter = RateLimiter(1000, clock, clock.sleep)
    assert limiter.spend(1100) == pytest.approx(1.0)
    limiter.set_rate(10_000)
    assert limiter.spend(0) == pytest.approx(0.1)
    limiter.set_rate(0)
    limiter.set_rate(1000)
    assert limiter.spend(0) == 0
    assert limiter.bytes_per_second == 1000


def test_a_wait_can_be_interrupted():
    limiter = RateLimiter(1)
    cancelled = threading.Event()
    said = []
    waiter = threading.Thread(target=lambda: said.append(limiter.wait(1 << 30, cancelled)))
    waiter.start()
    cancelled.set()
    waiter.join(10)
    assert said == [False]


def test_an_event_already_set_is_noticed_even_without_a_wait():
    cancelled = threading.Event()
    assert RateLimiter(0).wait(1, cancelled)
    cancelled.set()
    assert not RateLimiter(0).wait(1, cancelled)


def test_a_negative_rate_is_refused(clock):
    with pytest.raises(ValueError, match="-1 bytes/s"):
        RateLimiter(-1)
    limiter = RateLimiter(5, clock)
    with pytest.raises(ValueError, match="-2 bytes/s"):
        limiter.set_rate(-2)
    assert limiter.bytes_per_second == 5
