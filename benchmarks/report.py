"""Medians with spread, ratios against targets, as Markdown and JSON."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.scenario import Case, Contender, Figure, Target

NOISY_CPUS: Final = 0.2
"""More CPUs than that busy with others make a run worth little, with two CPUs in all."""

_VERDICTS: Final = {True: "yes", False: "**no**", None: "?"}

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
    compared: tuple[str, ...]

    @property
    def ratios(self) -> dict[str, float]:
        """Our median by QEMU's, for each of ours for which that means anything."""
        *ours, theirs = self.compared
        divisor = self.spreads.get(theirs)
        if not self.figure.compared or divisor is None or not divisor.median:
            return {}
        found = {name: self.spreads.get(name) for name in ours}
        return {name: spread.median / divisor.median for name, spread in found.items() if spread}

    @property
    def ratio(self) -> float | None:
        """The first of :attr:`ratios`; None when there is none."""
        return next(iter(self.ratios.values()), None)

    @property
    def reached(self) -> bool | None:
        """Whether each ratio is within the target; None when there is no saying."""
        if self.target is None or not self.ratios:
            return None
        return all(map(self.target.reached, self.ratios.values()))

    def to_json(self) -> dict[str, Any]:
        """As it stands in the results."""
        return {
            "figure": self.figure.key,
            "title": self.figure.title,
            "spreads": {name: vars(s) if s else None for name, s in self.spreads.items()},
            "ratio": self.ratio,
            "ratios": self.ratios,
            "target": str(self.target) if self.target else None,
            "reached": self.reached,
        }

    def to_markdown(self, contenders: Sequence[Contender]) -> str:
        """One row of a table."""
        cells = [str(self.spreads.get(one.name) or "-") for one in contenders]
        ratio = " and ".join(f"{ratio:.2f}" for ratio in self.ratios.values())
        verdict = _VERDICTS[self.reached] if self.target else ""
        title = f"**{self.figure.title}**" if self.target else self.figure.title
        row = [title, *cells, ratio, str(self.target or ""), verdict]
        return "| " + " | ".join(row) + " |"


@dataclass(frozen=True)
class Finding:
    """What several cases say together.

    :param reached: whether it is as it should be; None when there is no saying.
    """

    title: str
    value: str
    target: str
    reached: bool | None

    def to_markdown(self) -> str:
        """One row of a table."""
        return f"| {self.title} | {self.value} | {self.target} | {_VERDICTS[self.reached]} |"


def median(case: Case, contender: str, key: str, results: Results) -> float | None:
    """The median of one figure of one contender in one case."""
    for line in lines(case, results):
        spread = line.spreads.get(contender)
        if line.figure.key == key and spread is not None:
            return spread.median
    return None


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
            found.append(Line(figure, spreads, case.targets.get(figure.key), case.compared))
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


def to_json(
    head: Mapping[str, Any],
    cases: Sequence[Case],
    results: Results,
    across: Sequence[Finding] = (),
) -> dict[str, Any]:
    """Everything: the head, the tables, every run."""
    tables = {
        case.name: {
            "title": case.title,
            "lines": [line.to_json() for line in lines(case, results)],
        }
        for case in cases
    }
    together = [vars(finding) for finding in across]
    return {
        **head,
        "tables": tables,
        "across": together,
        "trouble": trouble(results),
        "runs": list(results),
    }


def to_markdown(
    head: Mapping[str, Any],
    cases: Sequence[Case],
    results: Results,
    across: Sequence[Finding] = (),
    title: str = "postcopy and QEMU, side by side",
) -> str:
    """The report that people read."""
    parts = [f"# {title}", _head(head)]
    parts += [warning] if (warning := noise(results)) else []
    parts += [_table(case, results) for case in cases]
    parts += [_together(across)] if across else []
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
    told.append(
        "* medians, with lowest and highest in brackets; ratio is postcopy / QEMU if nothing else is said"
    )
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


def _together(across: Sequence[Finding]) -> str:
    head = "| | | target | reached |\n| --- | --- | --- | --- |"
    return "\n".join(["## across the cases", "", head, *(one.to_markdown() for one in across)])
