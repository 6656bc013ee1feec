"""Medians with spread, ratios against targets, as Markdown and JSON."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.scenario import OURS, QEMU, Case, Contender, Figure, Target

NOISY_CPUS: Final = 0.2
"""More CPUs than that busy with others make a run worth little, with two CPUs in all."""

Results = Sequence[Mapping[str, Any]]
"""Of all runs: ``case``, ``contender``, and ``figures`` (perhaps ``verified``) or ``error``."""


@dataclass(frozen=True)
class Spread:
    """A figure over several runs."""

    median: float
    lowest: float
    highest: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """Of those that are there; None when there are none."""
        found = sorted(value for value in values if value is not None)
        if not found:
            return None
        return cls(statistics.median(found), found[0], found[-1], len(found))

    def __str__(self) -> str:
        if self.n == 1:
            return number(self.median)
        return f"**{number(self.median)}** [{number(self.lowest)} to {number(self.highest)}]"


def number(value: float) -> str:
    """Three digits that mean something."""
    if value and abs(value) < 0.1:
        return f"{value:.4f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{1 if abs(value) >= 10 else 2}f}"


@dataclass(frozen=True)
class Line:
    """One figure of one case: the spread of each contender, and how ours compares."""

    figure: Figure
    spreads: Mapping[str, Spread | None]
    target: Target | None

    @property
    def ratio(self) -> float | None:
        """Our median by QEMU's; None when there is none that means anything."""
        ours, theirs = self.spreads.get(OURS.name), self.spreads.get(QEMU.name)
        if not self.figure.compared or ours is None or theirs is None or not theirs.median:
            return None
        return ours.median / theirs.median

    @property
    def reached(self) -> bool | None:
        """Whether the ratio is within the target; None when there is no saying."""
        if self.target is None or self.ratio is None:
            return None
        return self.target.reached(self.ratio)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the results."""
        return {
            "figure": self.figure.key,
            "title": self.figure.title,
            "spreads": {name: vars(s) if s else None for name, s in self.spreads.items()},
            "ratio": self.ratio,
            "target": str(self.target) if self.target else None,
            "reached": self.reached,
        }

    def to_markdown(self, contenders: Sequence[Contender]) -> str:
        """One row of a table."""
        cells = [str(self.spreads.get(one.name) or "-") for one in contenders]
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        verdict = {True: "yes", False: "**no**", None: "?" if self.target else ""}[self.reached]
        title = f"**{self.figure.title}**" if self.target else self.figure.title
        row = [title, *cells, ratio, str(self.target or ""), verdict]
        return "| " + " | ".join(row) + " |"


def lines(case: Case, results: Results) -> list[Line]:
    """Every figure of a case that any run has."""
    runs = {
        contender.name: [
            result["figures"]
            for result in results
            if (result["case"], result["contender"]) == (case.name, contender.name)
            and "error" not in result
        ]
        for contender in case.contenders
    }
    found = []
    for figure in case.figures:
        spreads = {
            name: Spread.of(figures.get(figure.key) for figures in all_figures)
            for name, all_figures in runs.items()
        }
        if any(spreads.values()):
            found.append(Line(figure, spreads, case.targets.get(figure.key)))
    return found


def trouble(results: Results) -> list[str]:
    """One line for each run that failed or whose guest's memory is not what it must be."""
    found = []
    for result in results:
        where = f"{result['case']}, {result['contender']}, repeat {result['repeat']}"
        if "error" in result:
            found.append(f"{where}: {result['error']}")
        elif not result.get("verified", {}).get("ok", True):
            found.append(f"{where}: guest memory damaged: {result['verified']}")
    return found


def noise(results: Results) -> str:
    """Says so if others were busy during some runs; else empty."""
    done = [result["figures"] for result in results if "figures" in result]
    noisy = sum(figures.get("others_cpus", 0) > NOISY_CPUS for figures in done)
    if not noisy:
        return ""
    return (
        f"**Noisy: in {noisy} of {len(done)} runs others kept more than {NOISY_CPUS} CPUs busy. "
        "Do not believe the ratios.**"
    )


def to_json(head: Mapping[str, Any], cases: Sequence[Case], results: Results) -> dict[str, Any]:
    """Everything: the head, the tables, every run."""
    tables = {
        case.name: {
            "title": case.title,
            "lines": [line.to_json() for line in lines(case, results)],
        }
        for case in cases
    }
    return {**head, "tables": tables, "trouble": trouble(results), "runs": list(results)}


def to_markdown(head: Mapping[str, Any], cases: Sequence[Case], results: Results) -> str:
    """The report that people read."""
    parts = ["# postcopy and QEMU, side by side", _head(head)]
    parts += [warning] if (warning := noise(results)) else []
    parts += [_table(case, results) for case in cases]
    checked = [result["verified"]["ok"] for result in results if "verified" in result]
    if checked:
        intact = sum(checked)
        parts.append(
            f"Guest memory checked word by word after {len(checked)} runs: {intact} intact."
        )
    failed = trouble(results)
    if failed:
        parts.append("## Trouble\n\n" + "\n".join(f"* {line}" for line in failed))
    return "\n\n".join(parts) + "\n"


def _head(head: Mapping[str, Any]) -> str:
    told = [
        f"* {section}: " + ", ".join(f"{name} {value}" for name, value in facts.items())
        for section, facts in head.items()
    ]
    told.append("* medians, with lowest and highest in brackets; ratio is postcopy / QEMU")
    return "\n".join(told)


def _table(case: Case, results: Results) -> str:
    done = {
        one.name: sum(
            "error" not in result
            for result in results
            if (result["case"], result["contender"]) == (case.name, one.name)
        )
        for one in case.contenders
    }
    shown = [one for one in case.contenders if done[one.name]]
    titles = [f"{one.title} (n={done[one.name]})" for one in shown]
    columns = ["", *titles, "ratio", "target", "reached"]
    rows = [line.to_markdown(shown) for line in lines(case, results)]
    head = "| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|"
    return f"## {case.name}: {case.title}\n\n" + "\n".join([head, *rows])
