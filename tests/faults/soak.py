"""``make soak MINUTES=10``: random cuts and kills for as long as asked, one line a minute.

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
from faults import storm
from journeys.conftest import _begin

LINE_EVERY_S = 60.0
KINDS = {"cuts": storm.cuts, "kills": storm.kills}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1, help="where the seeds begin")
    wishes = parser.parse_args()
    begun = said = time.monotonic()
    done = dict.fromkeys(KINDS, 0)
    seed = wishes.seed
    while time.monotonic() - begun < wishes.minutes * 60:
        kind = list(KINDS)[seed // len(storm.TURNS) % len(KINDS)]
        try:
            one(KINDS[kind], seed)
        except pytest.skip.Exception:
            seed += 1  # this host has no huge pages to spare
            continue
        except BaseException:
            say(f"{kind} failed: POSTCOPY_SEED={seed} POSTCOPY_FAULTS={storm.PER_TEST} "
                f"python -m pytest tests/faults/test_random_{kind}.py")  # fmt: skip
            raise
        done[kind] += 1
        seed += 1
        if time.monotonic() - said >= LINE_EVERY_S:
            said = time.monotonic()
            say(told(begun, done))
    say(told(begun, done))


def one(storm_of, seed):
    """One test with its breaks, and nothing of it left behind."""
    variant = storm.variant_of(seed)
    with (
        storm.host_pages(variant),
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as stack,
    ):
        make = lambda *a, **more: stack.enter_context(_begin(*a, **more))  # noqa: E731
        storm_of(make, Path(folder), seed, variant)
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
