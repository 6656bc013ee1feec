"""The downtime that is reported beside the one that the guest felt: the goal is 2 ms between the two.

``python -m benchmarks.felt`` (``make bench-felt``): the measuring guest moves again and again, by precopy
and by postcopy.  What it felt is the gap between two of its accesses that spans the stop.  In postcopy that
holds the pages that it waits for to begin with, too: these are blocktime, and no downtime.
"""

import argparse
import statistics
import sys
import time
from typing import Final

from benchmarks.campaign import missing
from benchmarks.clock import Clock
from benchmarks.runner import RunFailed, Settings, started
from benchmarks.scenario import OURS, OURS_PREEMPT, QEMU, Contender, cases

GOAL_MS: Final = 2.0
_CONTENDERS: Final = {each.name: each for each in (OURS, OURS_PREEMPT, QEMU)}


def downtimes(case: str, contender: Contender, settings: Settings) -> tuple[float, float]:
    """One run: what the guest felt, and what was reported; in ms."""
    with started(cases()[case], contender, settings) as run:
        result = run.measure()
    felt_ms, info = result["figures"]["guest_downtime_ms"], result["source"]
    ours_us = info.get("x-postcopy", {}).get("guest-downtime-us")
    if felt_ms is None:
        raise RunFailed("the guest has noted no gap at the stop")
    return felt_ms, info["downtime"] if ours_us is None else ours_us / 1000


def _line(title: str, runs: list[tuple[float, float]]) -> str:
    apart = [felt_ms - told_ms for felt_ms, told_ms in runs]
    felt_ms, told_ms = (statistics.median(values) for values in zip(*runs, strict=True))
    within = sum(abs(each) <= GOAL_MS for each in apart)
    return (
        f"{title}: felt {felt_ms:.2f} ms, reported {told_ms:.2f} ms; felt longer by {_spread(apart)}; "
        f"{within} of {len(runs)} within {GOAL_MS:g} ms"
    )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ms ({min(values):.2f} to {max(values):.2f})"


def main() -> int:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.felt", description=__doc__)
    parser.add_argument("--cases", default="precopy,idle,postcopy,now", help="of make bench")
    parser.add_argument("--engines", default=OURS.name, help=f"of {','.join(_CONTENDERS)}")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    chosen = [_CONTENDERS[name] for name in options.engines.split(",")]
    if lacking := missing(chosen):
        print(lacking, file=sys.stderr)
        return 3
    settings = Settings(Clock.measured(), "kvm", 1024, 1280, 120)
    began = time.monotonic()
    for case in options.cases.split(","):
        for contender in chosen:
            runs = [downtimes(case, contender, settings) for _ in range(options.repeat)]
            print(_line(f"{case}, {contender.title}", runs), flush=True)
    print(f"{options.repeat} runs of each in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
