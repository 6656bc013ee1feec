"""``python -m benchmarks``: run, alternating the engines, and write tables and JSON."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import host, report
from benchmarks.clock import Clock
from benchmarks.runner import Settings, started
from benchmarks.scenario import CONTENDERS, Case, Contender, cases

_RESULTS = Path(__file__).resolve().parent / "results"
_QUICK_CASES: Final = ("precopy", "postcopy")
_QUICK_SCALE: Final = 0.5
_QUIET_CPUS: Final = 0.3


def main() -> int:
    """Run what the command line asks for; exit code.

    0 done, 1 a run failed or a guest's memory is damaged, 3 something is missing here.
    """
    options = _options()
    if missing := _missing(options):
        print(missing, file=sys.stderr)
        return 3
    # Ends with all processes ended, as an interrupt does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    everything = cases(_QUICK_SCALE if options.quick else 1.0)
    wanted = [everything[name] for name in options.cases]
    clock = Clock.measured()
    head = _head(options, clock)
    settings = Settings(clock, options.accel, options.ram, options.warm, options.timeout)
    results: list[dict[str, Any]] = []
    try:
        for repeat, case, contender in _plan(options, wanted):
            result = _run(case, contender, settings, options)
            results.append(
                {"case": case.name, "contender": contender.name, "repeat": repeat} | result
            )
            _tell(results[-1])
            _write(options, head, wanted, results)
    except KeyboardInterrupt:
        print("interrupted; the runs so far are written", file=sys.stderr)
    print(report.to_markdown(head, wanted, results))
    print(f"written: {options.json} and {options.json.with_suffix('.md')}", file=sys.stderr)
    return 1 if report.trouble(results) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="postcopy and a real QEMU, side by side"
    )
    names, contenders = tuple(cases()), tuple(one.name for one in CONTENDERS)
    add = parser.add_argument
    add("--cases", type=_ListOf(names), help=f"of {','.join(names)}; default: all")
    add("--engines", type=_ListOf(contenders), default=contenders, help="default: all")
    add("--repeat", type=int, help="runs of each; default 5, with --quick 1")
    add("--quick", action="store_true", help="a small guest, two cases: does it work at all?")
    add("--ram", type=int, help="MiB of guest memory; default 1024, with --quick 512")
    add("--accel", choices=("kvm", "tcg"), default="kvm", help="tcg: for QEMU alone")
    add("--warm", type=int, help="MiB to touch as huge pages before each phase; 0: no")
    add("--timeout", type=float, default=120, help="seconds a migration may take")
    add("--verify", choices=("all", "postcopy", "none"), default="postcopy",
        help="in which cases every word of guest memory is checked")  # fmt: skip
    add("--json", type=Path, help="default: benchmarks/results/DATE.json; .md beside it")
    options = parser.parse_args()
    quick = options.quick
    options.cases = options.cases or (_QUICK_CASES if quick else names)
    options.repeat = options.repeat or (1 if quick else 5)
    options.ram = options.ram or (512 if quick else 1024)
    options.warm = options.ram * 5 // 4 if options.warm is None else options.warm
    options.json = options.json or _RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    return options


class _ListOf:
    """Takes a comma-separated list of known names."""

    def __init__(self, known: Sequence[str]) -> None:
        self._known = known

    def __call__(self, text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in self._known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there is {','.join(self._known)}")
        return names


def _plan(options: argparse.Namespace, wanted: Sequence[Case]) -> list[tuple[int, Case, Contender]]:
    """The runs in order: engines alternate, and every repeat visits every case."""
    return [
        (repeat, case, contender)
        for repeat in range(options.repeat)
        for case in wanted
        for contender in case.contenders
        if contender.name in options.engines
    ]


def _run(
    case: Case, contender: Contender, settings: Settings, options: argparse.Namespace
) -> dict[str, Any]:
    busy_cpus = host.wait_until_quiet(_QUIET_CPUS)
    try:
        with started(case, contender, settings) as run:
            result = run.measure() | {"busy_cpus_before": busy_cpus}
            if options.verify == "all" or (options.verify == "postcopy" and case.is_postcopy):
                result["verified"] = run.verify()
    except (RuntimeError, OSError) as error:  # one run that fails must not end the others
        return {"error": f"{type(error).__name__}: {error}", "busy_cpus_before": busy_cpus}
    return result


def _missing(options: argparse.Namespace) -> str:
    """What this host lacks, with the cure; empty if nothing."""
    if options.accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "needs /dev/kvm: run as root or join group kvm"
    if os.geteuid() != 0:
        return "needs root, to read guest memory through /proc/PID/mem: run with sudo"
    engines = {one.engine for one in CONTENDERS if one.name in options.engines}
    for engine in engines:
        if not engine.version():
            return f"needs {engine.title}: run .ci/install-qemu, or choose --engines postcopy"
    return ""


def _head(options: argparse.Namespace, clock: Clock) -> dict[str, Mapping[str, Any]]:
    engines = {one.engine.title: one.engine.version() for one in CONTENDERS}
    asked = {"accel": options.accel, "guest_mib": options.ram, "repeat": options.repeat}
    asked |= {"warm_mib": options.warm, "quick": options.quick, "verify": options.verify}
    return {"host": host.facts(clock.hz), "engines": engines, "settings": asked}


def _tell(result: Mapping[str, Any]) -> None:
    """One line on standard error for each run, so that one sees it go on."""
    where = f"[{result['repeat']}] {result['case']}, {result['contender']}: "
    figures = result.get("figures", {})
    told = result.get("error") or ", ".join(
        f"{name} {report.number(value)}" for name, value in figures.items() if value is not None
    )
    if "verified" in result:
        told += ", memory intact" if result["verified"]["ok"] else ", MEMORY DAMAGED"
    print(where + told, file=sys.stderr, flush=True)


def _write(
    options: argparse.Namespace,
    head: Mapping[str, Any],
    wanted: Sequence[Case],
    results: report.Results,
) -> None:
    options.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.to_json(head, wanted, results), indent=1)
    options.json.write_text(text + "\n")
    options.json.with_suffix(".md").write_text(report.to_markdown(head, wanted, results))


if __name__ == "__main__":
    sys.exit(main())
