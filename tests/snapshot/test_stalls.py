"""Figures about waiting times: never too low, and at most an eighth too high."""

import random

import pytest

from postcopy.snapshot.stalls import Stalls


def test_nothing_has_happened():
    stalls = Stalls()
    assert (stalls.count, stalls.max_us, stalls.quantile_us(0.99)) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_quantiles(seed):
    numbers = random.Random(seed)
    samples = sorted(int(numbers.lognormvariate(5, 2)) for _ in range(1000))
    stalls = Stalls()
    for sample in samples:
        stalls.add(sample * 1000 + 999)
    assert stalls.count == len(samples)
    assert stalls.max_us == samples[-1]
    for fraction in (0.01, 0.5, 0.9, 0.99, 1.0):
        true = samples[max(0, round(len(samples) * fraction) - 1)]
        assert true <= stalls.quantile_us(fraction) <= true * 9 / 8 + 1


def test_each_microsecond_lies_in_its_bucket():
    for us in [*range(2000), 10**6, 10**9]:
        stalls = Stalls()
        stalls.add(us * 1000)
        assert stalls.quantile_us(1.0) == us  # the only one is the largest, which is exact
        stalls.add(10**13)
        assert us <= stalls.quantile_us(0.5) <= us * 9 / 8 + 1
