"""Figures of latencies: never too low, at most a 64th too high, in a room that does not grow."""

import random
import tracemalloc

import pytest

from postcopy.paging.latencies import LatencyHistogram
from postcopy.statistics import LATENCY_BUCKETS

US = 1000


def test_nothing_has_been_measured():
    figures = LatencyHistogram().figures()
    assert (figures.count, figures.mean_ns, figures.max_us) == (0, 0, 0)
    assert (figures.p50_us, figures.p99_us) == (0, 0)
    assert figures.distribution == (0,) * LATENCY_BUCKETS


@pytest.mark.parametrize("seed", range(5))
def test_quantiles(seed):
    numbers = random.Random(seed)
    samples = sorted(int(numbers.lognormvariate(5, 2)) for _ in range(1000))
    histogram = LatencyHistogram()
    for sample in samples:
        histogram.add(sample * US + 999)
    figures = histogram.figures()
    assert figures.count == histogram.count == len(samples)
    assert figures.max_us == samples[-1]
    assert figures.mean_ns == sum(samples) * US // len(samples) + 999
    assert samples[499] <= figures.p50_us <= samples[499] * 65 / 64
    assert samples[989] <= figures.p99_us <= samples[989] * 65 / 64


def test_each_microsecond_lies_in_its_bucket():
    for us in [*range(2000), 10**6, 10**9, 10**10]:
        histogram = LatencyHistogram()
        histogram.add(us * US)
        assert histogram.figures().p50_us == us  # the only one is the largest, which is exact
        histogram.add(10**18)
        assert us <= histogram.figures().p50_us <= us * 65 / 64


def test_powers_of_two_at_their_edges():
    """QEMU counts what is shorter than 1 us as 1 us, and what is longer than all in the last one."""
    histogram = LatencyHistogram()
    for us in [0, 1, 2, 3, 4, 127, 128, 2**22, 2**23 - 1, 2**23, 2**24, 2**30]:
        histogram.add(us * US)
    distribution = histogram.figures().distribution
    assert distribution[:3] == (2, 2, 1)
    assert distribution[6:8] == (1, 1)
    assert distribution[22:] == (2, 3)
    assert sum(distribution) == 12


def test_the_room_does_not_grow():
    histogram = LatencyHistogram()
    tracemalloc.start()
    try:
        before_bytes, _ = tracemalloc.get_traced_memory()
        for sample in range(20_000):
            histogram.add(sample * 1_000_003)
        after_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after_bytes - before_bytes < 4096
