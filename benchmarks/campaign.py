"""What the commands that measure have in common: options, the loop over the runs, what is written."""

import argparse
import compileall
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import postcopy
from benchmarks import host, report
from benchmarks.clock import Clock
from benchmarks.report import Finding, Results
from benchmarks.scenario import Case, Contender

_RESULTS: Final = Path(__file__).resolve().parent / "results"
_QUIET_CPUS: Final = 0.3
SHARED_MEMORY: Final = Path("/dev/shm")
"""Where images are written: no disk is measured."""

Planned = Iterable[tuple[int, Case, Contender]]
"""The runs in order: number of the repeat, case, contender."""


@dataclass(frozen=True)
class Campaign:
    """Runs that are told one by one and written, all of them, after each.

    :param head: facts by section, for the beginning of the report.
    :param path: of the JSON; the Markdown lies beside it.
    :param across: what is to be said of several cases together.
    :param quiet_s: how long to wait before each run for others to be quiet.
    """

    title: str
    head: Mapping[str, Mapping[str, Any]]
    cases: Sequence[Case]
    path: Path
    across: Callable[[Results], list[Finding]] = field(default=lambda _: [])
    quiet_s: float = 15

    def run(self, plan: Planned, measure: Callable[[Case, Contender], dict[str, Any]]) -> int:
        """Do it; the exit code: 1 if a run has failed."""
        results: list[dict[str, Any]] = []
        compile_ours()
        try:
            for repeat, case, contender in plan:
                named = {"case": case.name, "contender": contender.name, "repeat": repeat}
                results.append(named | self._measured(measure, case, contender))
                tell(results[-1])
                self._write(results)
        except KeyboardInterrupt:
            print("interrupted; the runs so far are written", file=sys.stderr)
        print(self._markdown(results))
        print(f"written: {self.path} and {self.path.with_suffix('.md')}", file=sys.stderr)
        return 1 if report.trouble(results) else 0

    def _measured(
        self, measure: Callable[[Case, Contender], dict[str, Any]], case: Case, contender: Contender
    ) -> dict[str, Any]:
        busy = {"busy_cpus_before": host.wait_until_quiet(_QUIET_CPUS, self.quiet_s)}
        try:
            return measure(case, contender) | busy
        except (RuntimeError, OSError) as error:  # one that fails must not end the others
            return {"error": f"{type(error).__name__}: {error}"} | busy

    def _write(self, results: Results) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = report.to_json(self.head, self.cases, results, self.across(results))
        self.path.write_text(json.dumps(found, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(self._markdown(results))

    def _markdown(self, results: Results) -> str:
        return report.to_markdown(self.head, self.cases, results, self.across(results), self.title)


def compile_ours() -> None:
    """Have our modules compiled, as those of an installed package are.

    Where nobody may write byte code (``PYTHONDONTWRITEBYTECODE``) each process would compile them all.
    """
    for folder in postcopy.__path__:
        compileall.compile_dir(folder, quiet=1)


def alternating(
    cases: Sequence[Case], repeats: int, *, by_case: bool = False, wanted: Sequence[str] = ()
) -> list[tuple[int, Case, Contender]]:
    """The runs in order: contenders take turns, and every repeat visits every case.

    :param by_case: end one case before the next: what it has prepared can be removed then.
    :param wanted: names of contenders; none are all.
    """
    if by_case:
        return [run for case in cases for run in alternating([case], repeats, wanted=wanted)]
    return [
        (repeat, case, contender)
        for repeat in range(repeats)
        for case in cases
        for contender in case.contenders
        if not wanted or contender.name in wanted
    ]


def parser(name: str, description: str, sizes: str) -> argparse.ArgumentParser:
    """The options that all such commands have."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--repeat", type=int, default=5, help="runs of each; default 5")
    made.add_argument("--sizes", type=sizes_mib, default=sizes_mib(sizes),
        help=f"MiB of guest memory; default {sizes}")  # fmt: skip
    made.add_argument("--engines", type=lambda text: tuple(text.split(",")), default=(),
        help="names of contenders, as in the JSON; default: all")  # fmt: skip
    made.add_argument("--json", type=Path, default=default_path(name),
        help="default: benchmarks/results/DATE-NAME.json; .md beside it")  # fmt: skip
    made.add_argument("--timeout", type=float, default=120, help="seconds one step may take")
    made.add_argument("--quiet", type=float, default=15,
        help="seconds to wait before each run for others to be quiet")  # fmt: skip
    made.add_argument("--no-verify", dest="verify", action="store_false",
        help="do not check memory after each run")  # fmt: skip
    return made


def default_path(name: str) -> Path:
    """Where the JSON goes when nobody says where."""
    return _RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}.json"


def sizes_mib(text: str) -> tuple[int, ...]:
    """Take a comma-separated list of MiB, smallest first."""
    return tuple(sorted({int(part) for part in text.split(",")}))


def missing(contenders: Iterable[Contender], *, kvm: bool = True) -> str:
    """What this host lacks, with the cure; empty if nothing."""
    if kvm and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "needs /dev/kvm: run as root or join group kvm"
    if os.geteuid() != 0:
        return "needs root, to read guest memory through /proc/PID/mem: run with sudo"
    for engine in {one.engine for one in contenders}:
        if not engine.version():
            return f"needs {engine.title}: run .ci/install-qemu, or choose --engines postcopy"
    return ""


def head(
    clock: Clock, contenders: Iterable[Contender], asked: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """The beginning of a report: where, what, how."""
    engines = {one.engine.title: one.engine.version() for one in contenders}
    return {"host": host.facts(clock.hz), "engines": engines, "settings": asked}


def tell(result: Mapping[str, Any]) -> None:
    """One line on standard error for each run, so that one sees it go on."""
    where = f"[{result['repeat']}] {result['case']}, {result['contender']}: "
    figures = result.get("figures", {})
    told = result.get("error") or ", ".join(
        f"{name} {report.number(value)}" for name, value in figures.items() if value is not None
    )
    if "verified" in result:
        told += ", memory intact" if result["verified"]["ok"] else ", MEMORY DAMAGED"
    print(where + told, file=sys.stderr, flush=True)
