"""Shows a migration on a terminal: a bar that moves, and above it the rounds that are over."""

from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from postcopy.cli.progress_view import figures, phase_name
from postcopy.client.progress import Phase, Progress

_COLOURS = {
    Phase.PRECOPY: "cyan",
    Phase.SWITCHOVER: "yellow",
    Phase.POSTCOPY: "magenta",
    Phase.PAUSED: "red",
    Phase.SAVING: "cyan",
    Phase.DIGESTS: "yellow",
    Phase.RECOVERY: "yellow",
    Phase.COMPLETED: "green",
    Phase.FAILING: "red",
    Phase.FAILED: "red",
}


class LiveView:
    """One bar with the phase before and the figures behind it."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=Console(),
        )
        self._task = self._bars.add_task("setup", total=1.0, figures="")
        self._last: Progress | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Move the bar; what is over stays above it as a line."""
        last, self._last = self._last, progress
        if last is not None and phase_name(last) != phase_name(progress):
            self._bars.console.print(
                f"[dim]{last.elapsed_ms / 1000:7.2f} s  {phase_name(last):<18}{figures(last)}[/dim]",
                highlight=False,
            )
        colour = _COLOURS.get(progress.phase, "white")
        self._bars.update(
            self._task,
            completed=progress.fraction,
            description=f"[{colour}]{phase_name(progress):<17}[/]",
            figures=figures(progress),
        )

    def note(self, text: str) -> None:
        """Print it above the bar."""
        self._bars.console.print(text, highlight=False, markup=False)

    def finish(self, outcome: dict[str, Any]) -> None:
        """Nothing: the report follows."""
