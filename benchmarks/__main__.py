"""``python -m benchmarks``: run, alternating the engines, and write tables and JSON."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import campaign
from benchmarks.clock import Clock
from benchmarks.runner import Settings, started
from benchmarks.scenario import CONTENDERS, USUAL_CASES, Case, Contender, cases
from benchmarks.workload import MIB
from postcopy.errors import HostCannot
from postcopy.kernel.huge_pages import check_pool
from postcopy.machine.memory_blocks import HUGE_PAGE_BYTES

_QUICK_CASES: Final = ("precopy", "postcopy")
_QUICK_SCALE: Final = 0.5


def main() -> int:
    """Run what the command line asks for; exit code.

    0 done, 1 a run failed or a guest's memory is damaged, 3 something is missing here.
    """
    options = _options()
    chosen = [one for one in CONTENDERS if one.name in options.engines]
    if missing := campaign.missing(chosen, kvm=options.accel == "kvm"):
        print(missing, file=sys.stderr)
        return 3
    # Ends with all processes ended, as an interrupt does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    everything = cases(_QUICK_SCALE if options.quick else 1.0)
    wanted = [everything[name] for name in options.cases]
    try:
        if any(case.huge_pages for case in wanted):
            check_pool(2 * options.ram * MIB // HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    except HostCannot as error:
        print(error, file=sys.stderr)
        return 3
    clock = Clock.measured()
    settings = Settings(clock, options.accel, options.ram, options.warm, options.timeout)
    return campaign.Campaign(
        title="postcopy and QEMU, side by side",
        head=campaign.head(clock, CONTENDERS, _asked(options)),
        cases=wanted,
        path=options.json,
    ).run(
        campaign.alternating(wanted, options.repeat, wanted=options.engines),
        lambda case, contender: _run(case, contender, settings, options.verify),
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="postcopy and a real QEMU, side by side"
    )
    names, contenders = tuple(cases()), tuple(one.name for one in CONTENDERS)
    add = parser.add_argument
    add(
        "--cases",
        type=_ListOf(names),
        help=f"of {','.join(names)}, or all; default: the first five",
    )
    add("--engines", type=_ListOf(contenders), default=contenders, help="default: all")
    add("--repeat", type=int, help="runs of each; default 5, with --quick 1")
    add("--quick", action="store_true", help="a small guest, two cases: does it work at all?")
    add("--ram", type=int, help="MiB of guest memory; default 1024, with --quick 512")
    add("--accel", choices=("kvm", "tcg"), default="kvm", help="tcg: for QEMU alone")
    add("--warm", type=int, help="MiB to touch as huge pages before each phase; 0: no")
    add("--timeout", type=float, default=120, help="seconds a migration may take")
    add("--verify", choices=("all", "postcopy", "none"), default="postcopy",
        help="in which cases every word of guest memory is checked")  # fmt: skip
    add("--json", type=Path, help="default: benchmarks/results/DATE-migrations.json; .md beside it")
    options = parser.parse_args()
    quick = options.quick
    options.cases = options.cases or (_QUICK_CASES if quick else USUAL_CASES)
    options.repeat = options.repeat or (1 if quick else 5)
    options.ram = options.ram or (512 if quick else 1024)
    options.warm = options.ram * 5 // 4 if options.warm is None else options.warm
    options.json = options.json or campaign.default_path("migrations")
    return options


class _ListOf:
    """Takes a comma-separated list of known names."""

    def __init__(self, known: Sequence[str]) -> None:
        self._known = known

    def __call__(self, text: str) -> tuple[str, ...]:
        names = tuple(self._known) if text == "all" else tuple(text.split(","))
        unknown = [name for name in names if name not in self._known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there is {','.join(self._known)}")
        return names


def _run(case: Case, contender: Contender, settings: Settings, verify: str) -> dict[str, Any]:
    with started(case, contender, settings) as run:
        result = run.measure()
        if verify == "all" or (verify == "postcopy" and case.is_postcopy):
            result["verified"] = run.verify()
    return result


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    asked = {"accel": options.accel, "guest_mib": options.ram, "repeat": options.repeat}
    return asked | {"warm_mib": options.warm, "quick": options.quick, "verify": options.verify}


if __name__ == "__main__":
    sys.exit(main())
