"""``python -m benchmarks.links``: migrations over a link of so many Gbit/s, ours and QEMU's, in turns."""

import argparse
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks import campaign
from benchmarks.clock import Clock
from benchmarks.runner import Settings, started
from benchmarks.scenario import CONTENDERS, Case, Contender, link_cases
from benchmarks.shaped_link import LinkFailed, ShapedLink

_GUEST_MIB: Final = 1024


def main() -> int:
    """Run what the command line asks for; exit code as :mod:`benchmarks`."""
    options = _options()
    if missing := campaign.missing(CONTENDERS):
        print(missing, file=sys.stderr)
        return 3
    # Ends with processes and namespaces removed, as an interrupt does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found = link_cases()
    wanted = (
        [found[name] for name in options.cases.split(",")] if options.cases else [*found.values()]
    )
    asked = {"gbit_s": options.gbit, "guest_mib": _GUEST_MIB, "repeat": options.repeat}
    clock = Clock.measured()
    try:
        with ShapedLink(options.gbit) as link:
            settings = Settings(clock, "kvm", _GUEST_MIB, 0, options.timeout, link)
            return campaign.Campaign(
                title=f"postcopy and QEMU over a link of {options.gbit:g} Gbit/s",
                head=campaign.head(clock, CONTENDERS, asked),
                cases=wanted,
                path=options.json,
                quiet_s=options.quiet,
            ).run(
                campaign.alternating(wanted, options.repeat, wanted=options.engines),
                partial(_run, settings=settings, verify=options.verify),
            )
    except LinkFailed as error:
        print(error, file=sys.stderr)
        return 3


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.links",
        description="migrations over a link that is slower than loopback",
    )
    add = parser.add_argument
    add("--gbit", type=float, default=1.0, help="of the link, 10^9 bits a second; default 1")
    add("--cases", help=f"of {','.join(link_cases())}; default: all")
    add("--engines", type=lambda text: tuple(text.split(",")), default=(),
        help="names of contenders, as in the JSON; default: all")  # fmt: skip
    add("--repeat", type=int, default=5, help="runs of each; default 5")
    add("--json", type=Path, default=campaign.default_path("links"),
        help="default: benchmarks/results/DATE-links.json; .md beside it")  # fmt: skip
    add("--timeout", type=float, default=120, help="seconds a migration may take")
    add(
        "--quiet",
        type=float,
        default=15,
        help="seconds to wait before each run for others to be quiet",
    )
    add(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not check memory after each run",
    )
    return parser.parse_args()


def _run(case: Case, contender: Contender, *, settings: Settings, verify: bool) -> dict[str, Any]:
    with started(case, contender, settings) as run:
        result = run.measure()
        if verify:
            result["verified"] = run.verify()
    return result


if __name__ == "__main__":
    sys.exit(main())
