"""The downtime that is reported beside the one that the guest felt: the goal is 2 ms between the two.

``python -m benchmarks.felt`` (``make bench-felt``): the measuring guest moves again and again, by precopy
and by postcopy.  What it felt is the gap between two of its accesses that spans the stop.  In postcopy the
first access at the destination may have to wait for pages: that is blocktime and no downtime, and is told
apart.
"""

import argparse
import statistics
import sys
import time
from typing import Final

from benchmarks.campaign import missing
from benchmarks.clock import Clock
from benchmarks.runner import Settings, started
from benchmarks.scenario import OURS, OURS_PREEMPT, QEMU, Contender, cases
from benchmarks.timings import Figures

GOAL_MS: Final = 2.0
_CONTENDERS: Final = {each.name: each for each in (OURS, OURS_PREEMPT, QEMU)}


def downtimes(case: str, contender: Contender, settings: Settings) -> Figures:
    """One run: what the guest felt, how much of that was its first access, and what was reported; in ms."""
    with started(cases()[case], contender, settings) as run:
        result = run.measure()
    figures, info = result["figures"], result["source"]
    ours_us = info.get("x-postcopy", {}).get("guest-downtime-us")
    return {
        "felt": figures["guest_downtime_ms"],
        "access": figures["first_access_ms"],
        "reported": info["downtime"] if ours_us is None else ours_us / 1000,
    }


def _line(title: str, runs: list[Figures]) -> str:
    known = [(r["felt"], r["access"], r["reported"]) for r in runs]
    whole = [
        (felt, access, told)
        for felt, access, told in known
        if felt is not None and access is not None and told is not None
    ]
    apart = [felt - told for felt, _, told in whole]
    besides = [felt - access - told for felt, access, told in whole]
    medians = [statistics.median(values) for values in zip(*whole, strict=True)]
    return (
        f"{title}: felt {medians[0]:.2f} ms, of that the first access {medians[1]:.2f} ms; reported "
        f"{medians[2]:.2f} ms; felt longer by {_spread(apart)}, without the first access by "
        f"{_spread(besides)}; {sum(abs(each) <= GOAL_MS for each in besides)} of {len(runs)} within "
        f"{GOAL_MS:g} ms"
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
            for run in runs:
                print("  ", {name: value and round(value, 3) for name, value in run.items()})
    print(f"{options.repeat} runs of each in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
