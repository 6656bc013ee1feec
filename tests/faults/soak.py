"""``make soak MINUTES=10``: random cuts, kills, orders, messages and failing calls, a line a minute.

It ends with the first failure, and says the seed that repeats it.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fakes.pair import engines
from fakes.waiting import wait_until
from faults import orders, storm
from faults.back_ends import back_ends
from faults.failing_journeys import JOURNEYS
from faults.failing_matrix import Runner, draw, host_pages
from faults.failing_scene import Case
from journeys.conftest import _begin
from vhost_user import hostile

LINE_EVERY_S = 60.0
MESSAGES = 100_000


def _orders(_journey, folder, seed, _variant):
    """As many cases of the matrix of orders as a storm has breaks."""
    for number, case in enumerate(orders.sample(storm.PER_TEST, seed)):
        (folder / str(number)).mkdir()
        with orders.host_pages(case), contextlib.ExitStack() as stack:
            orders.run(case, _maker(stack), folder / str(number))


def _maker(stack):
    """What makes journeys that are closed with the stack."""
    return lambda *arguments, **more: stack.enter_context(_begin(*arguments, **more))


def _messages(_journey, folder, seed, _variant):
    """Front ends that send what cannot be to a back end of ours."""
    disk = folder / "disk"
    disk.write_bytes(bytes(1 << 20))
    hostile.flood(disk, seed, MESSAGES)


STORMS = {
    "cuts": storm.cuts,
    "kills": storm.kills,
    "back ends": back_ends,
    "orders": _orders,
    "messages": _messages,
}
FAILING = "failing calls"
KINDS = (*STORMS, FAILING)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1, help="where the seeds begin")
    wishes = parser.parse_args()
    begun = said = time.monotonic()
    done = dict.fromkeys(KINDS, 0)
    seed = wishes.seed
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(Matrix(Path(folder))) as matrix,
    ):
        while time.monotonic() - begun < wishes.minutes * 60:
            kind = KINDS[seed // len(storm.TURNS) % len(KINDS)]
            try:
                matrix.one(seed) if kind == FAILING else one(STORMS[kind], seed)
            except pytest.skip.Exception:
                seed += 1  # this host has no huge pages to spare
                continue
            except BaseException:
                say(how_to_repeat(kind, seed))
                raise
            done[kind] += 1
            seed += 1
            if time.monotonic() - said >= LINE_EVERY_S:
                said = time.monotonic()
                say(told(begun, done))
    say(told(begun, done))


def how_to_repeat(kind, seed):
    """What to type."""
    if kind == FAILING:
        return f"{kind} failed: POSTCOPY_SEED={seed} python -m pytest tests/faults/test_failing_calls.py"
    if kind == "orders":
        count = f"POSTCOPY_SEED={seed} POSTCOPY_ORDERS={storm.PER_TEST}"
        return f"orders failed: {count} python -m pytest tests/faults/test_orders.py"
    if kind == "messages":
        count = f"POSTCOPY_SEED={seed} POSTCOPY_MESSAGES={MESSAGES}"
        return f"messages failed: {count} python -m pytest tests/vhost_user/test_hostile.py"
    if kind == "back ends":
        count = f"POSTCOPY_SEED={seed} POSTCOPY_BACK_END_JOURNEYS=1"
        return f"back ends failed: {count} python -m pytest tests/faults/test_random_back_ends.py"
    faults = f"POSTCOPY_SEED={seed} POSTCOPY_FAULTS={storm.PER_TEST}"
    return f"{kind} failed: {faults} python -m pytest tests/faults/test_random_{kind}.py"


class Matrix:
    """Of each journey, by turns, one case after another."""

    def __init__(self, folder):
        self._runner = Runner(folder)
        self._seen = {}

    def one(self, seed):
        """The first case that the seed draws."""
        journey = list(JOURNEYS)[seed % len(JOURNEYS)]
        with host_pages(journey):
            if journey not in self._seen:
                self._seen[journey] = self._run(Case(journey)).seen
            self._run(next(draw(journey, self._seen[journey], seed)))

    def _run(self, case):
        result = self._runner.run(case)
        assert not result.wrong, result
        return result

    def close(self):
        self._runner.close()


def one(storm_of, seed):
    """One test with its breaks, and nothing of it left behind."""
    variant = storm.variant_of(seed)
    with (
        storm.host_pages(variant),
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as stack,
    ):
        storm_of(_maker(stack), Path(folder), seed, variant)
    wait_until(lambda: not engines(), 10, f"engines are left: {engines()}")


def told(begun, done):
    minutes = (time.monotonic() - begun) / 60
    kinds = ", ".join(f"{count} tests with {kind}" for kind, count in done.items())
    return f"{minutes:.0f} min: {kinds}; every page was right"


def say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
