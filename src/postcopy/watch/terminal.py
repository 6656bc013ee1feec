"""The view of a terminal: full screen where there is one, a line a second elsewhere."""

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING, Final, Self

import click

from postcopy.statistics import LATENCY_BUCKETS, MAP_STATES
from postcopy.watch import waits
from postcopy.watch.sample import Sample

if TYPE_CHECKING:
    from rich.layout import Layout
    from rich.panel import Panel
    from rich.text import Text

_MIB: Final = 1 << 20
_KEPT: Final = 400
_PLAIN_EVERY_MS: Final = 1000
_SPARKS: Final = " ▁▂▃▄▅▆▇█"
_SHADES: Final = " ░▒▓█"
_COLOURS: Final = {
    "s": "blue",
    "w": "yellow",
    "i": "green",
    "d": "magenta",
    "a": "bright_red",
    "z": "bright_black",
    "l": "red",
}
_WAIT_MARKS: Final = {"paused": "p", "recovery": "r", "engine": "e"}
_STOPPED: Final = "s"
_MOST_STATUSES: Final = 8
_MAP_ROWS: Final = 6


class Series:
    """What views draw of several samples."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=_KEPT)
        self.statuses: list[tuple[int, str]] = []

    def add(self, sample: Sample) -> None:
        """Take the next one."""
        self.samples.append(sample)
        if not self.statuses or self.statuses[-1][1] != sample.status:
            self.statuses.append((sample.t_ms, sample.status))

    def pairs(self) -> Iterator[tuple[Sample, Sample]]:
        """Each sample with the one before it."""
        yield from itertools.pairwise(self.samples)

    def latencies(self) -> list[list[int]]:
        """Of each interval, how many faults were in each bucket."""
        none = (0,) * LATENCY_BUCKETS
        return [
            [
                max(0, now - then)
                for then, now in zip(a.latency or none, b.latency or none, strict=False)
            ]
            for a, b in self.pairs()
        ]

    def timeline(self, vcpu: int) -> str:
        """Of each interval a mark: what a vCPU waited for, or a shade for how long it waited for pages."""
        return "".join(_wait_mark(a, b, vcpu) for a, b in self.pairs())


def _wait_mark(before: Sample, after: Sample, vcpu: int) -> str:
    if waits.stopped(before, after):
        return _STOPPED
    shares = waits.shares(before, after, vcpu)
    most = max(shares, key=shares.__getitem__, default="")
    if most in _WAIT_MARKS:
        return _WAIT_MARKS[most]
    share = sum(shares.values())
    return _SHADES[-1 if share > 0.8 else ceil(share * 4)]


def figures(sample: Sample) -> list[tuple[str, str]]:
    """The figures of one sample, for a table: a name and a value with its unit."""
    rows = [
        ("phase", f"{sample.phase}, round {sample.round}" if sample.round else sample.phase),
        ("progress", f"{sample.fraction:.0%}"),
        ("bandwidth", f"{sample.rate_bytes / _MIB:.1f} MiB/s"),
        ("dirty rate", f"{sample.dirty_rate_bytes / _MIB:.1f} MiB/s"),
        ("sent", f"{sample.transferred_bytes / _MIB:.1f} MiB"),
        (
            "remaining",
            f"{sample.remaining_bytes / _MIB:.1f} of {sample.total_bytes / _MIB:.0f} MiB",
        ),
        ("faults", f"{sample.faults}, {sample.faults_per_s} a second"),
    ]
    if sample.p50_us is not None and sample.p99_us is not None and sample.max_us is not None:
        ms = [each / 1000 for each in (sample.p50_us, sample.p99_us, sample.max_us)]
        rows.append(
            ("fault latency", f"p50 {ms[0]:.2f} ms, p99 {ms[1]:.2f} ms, max {ms[2]:.2f} ms")
        )
    for vcpu, waited_us in enumerate(sample.blocktime_us[:8]):
        parts = [f"{name} {ms:.1f}" for name, ms in waits.causes(sample, vcpu)]
        causes = f" ({', '.join(parts)})" if parts else ""
        rows.append((f"blocktime of vCPU {vcpu}", f"{waited_us / 1000:.1f} ms{causes}"))
    if sample.downtime_ms is not None:
        rows.append(("downtime", f"{sample.downtime_ms:.1f} ms"))
    elif sample.expected_downtime_ms is not None:
        rows.append(("downtime, expected", f"{sample.expected_downtime_ms:.0f} ms"))
    return rows


class WatchView(ABC):
    """Shows samples; used in ``with``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 - most have nothing to restore
        """Restore the terminal."""

    @abstractmethod
    def show(self, sample: Sample) -> None:
        """Show the next sample."""


class PlainView(WatchView):
    """A line a second, and one for each new phase, status or note."""

    def __init__(self) -> None:
        self._last: tuple[object, ...] = ()
        self._shown_ms = -_PLAIN_EVERY_MS

    def show(self, sample: Sample) -> None:
        """Print it if there is anything new to say, or a second has passed."""
        key = (sample.phase, sample.status, sample.notes)
        if key == self._last and sample.t_ms < self._shown_ms + _PLAIN_EVERY_MS:
            return
        for note in sample.notes:
            if not self._last or note not in self._last[2]:  # type: ignore[operator]
                click.echo(f"note: {note}")
        self._last, self._shown_ms = key, sample.t_ms
        click.echo(line(sample))


def line(sample: Sample) -> str:
    """One sample in one line."""
    parts = [
        f"{sample.t_ms / 1000:7.2f} s {sample.fraction:4.0%}  {sample.status:<17}",
        f"{sample.rate_bytes / _MIB:.0f} MiB/s, {sample.remaining_bytes / _MIB:.0f} MiB remaining, "
        f"guest writes {sample.dirty_rate_bytes / _MIB:.0f} MiB/s, {sample.faults_per_s} faults/s",
    ]
    if sample.downtime_ms is not None:
        parts.append(f", downtime {sample.downtime_ms:.1f} ms")
    if sample.waits_for:
        parts.append(f"; waits for {sample.waits_for}")
    return "".join(parts)


class FullScreenView(WatchView):
    """All of it, on the whole screen; the last picture stays when it ends."""

    def __init__(self) -> None:
        # Imported here: rich takes long, and only a terminal needs it.
        from rich.console import Console
        from rich.live import Live

        self._series = Series()
        self._console = Console()
        self._live = Live(console=self._console, screen=True, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._series.samples:
            self._console.print(screen(self._series, self._console.width, 30), height=30)

    def show(self, sample: Sample) -> None:
        """Draw it."""
        self._series.add(sample)
        size = self._console.size
        self._live.update(screen(self._series, size.width, size.height), refresh=True)


def screen(series: Series, width: int, height: int) -> "Layout":
    """The whole picture, for a console of that size."""
    from rich.layout import Layout

    last = series.samples[-1]
    room = max(10, width - 4)
    half = max(8, width // 2 - 4)
    rows = max(_MAP_ROWS, height - 26)
    whole = Layout()
    whole.split_column(
        Layout(_panel("status", _words(series)), size=6),
        Layout(_panel("memory", _map(last, room, rows - 3)), size=rows),
        Layout(name="lower"),
    )
    whole["lower"].split_row(Layout(_panel("figures", _table(last))), Layout(name="right"))
    whole["right"].split_column(
        Layout(_panel("bandwidth, dirty rate, faults/s", _sparks(series, half)), size=5),
        Layout(_panel("what vCPUs wait for", _timelines(series, half)), size=7),
        Layout(_panel("latency of faults", _heat(series, half))),
    )
    return whole


def _panel(title: str, text: "Text") -> "Panel":
    from rich.panel import Panel

    return Panel(text, title=title, title_align="left", border_style="bright_black")


def _words(series: Series) -> "Text":
    from rich.text import Text

    last = series.samples[-1]
    path = " → ".join(status for _, status in series.statuses[-_MOST_STATUSES:])
    parts = [f"{last.t_ms / 1000:.1f} s  {last.fraction:.0%}  {path}"]
    parts += [f"source: {last.source}" if last.source else ""]
    parts += [f"destination: {last.destination}" if last.destination else ""]
    waits_for = f"waits for {last.waits_for}" if last.waits_for else ""
    parts.append("; ".join([*([waits_for] if waits_for else []), *last.notes]))
    return Text("\n".join(part for part in parts if part), overflow="ellipsis", no_wrap=True)


def _table(sample: Sample) -> "Text":
    from rich.text import Text

    rows = figures(sample)
    width = max(len(name) for name, _ in rows)
    return Text("\n".join(f"{name:<{width}}  {value}" for name, value in rows), no_wrap=True)


def _map(sample: Sample, width: int, rows: int) -> "Text":
    from rich.text import Text

    text = Text(no_wrap=True)
    if sample.map is None:
        return Text("no map: the machine does not tell where its pages are")
    cells, room = sample.map["cells"], width * max(1, rows - 1)
    step = max(1.0, len(cells) / room)
    for place in range(min(room, len(cells))):
        part = cells[int(place * step) : max(int(place * step) + 1, int((place + 1) * step))]
        urgent = [letter for letter in "la" if letter in part]
        letter = urgent[0] if urgent else max(set(part), key=part.count)
        text.append("█", _COLOURS[letter])
        if place % width == width - 1:
            text.append("\n")
    text.append("\n")
    for letter, name in MAP_STATES.items():
        pages = sample.map["pages"].get(name, 0)
        if pages:
            text.append("█ ", _COLOURS[letter])
            text.append(f"{name} {pages / 256:.1f} MiB  ")
    return text


def _spark(values: list[float], width: int) -> str:
    values = values[-width:]
    most = max(values, default=0) or 1
    return "".join(_SPARKS[round(value / most * (len(_SPARKS) - 1))] for value in values)


def _sparks(series: Series, width: int) -> "Text":
    from rich.text import Text

    kept = list(series.samples)
    text = Text(no_wrap=True)
    for colour, values in (
        ("cyan", [float(each.rate_bytes) for each in kept]),
        ("magenta", [float(each.dirty_rate_bytes) for each in kept]),
        ("yellow", [float(each.faults_per_s) for each in kept]),
    ):
        text.append(_spark(values, width) + "\n", colour)
    return text


def _timelines(series: Series, width: int) -> "Text":
    from rich.text import Text

    count = min(3, len(series.samples[-1].blocktime_us))
    lines = [series.timeline(vcpu)[-(width - 3) :] for vcpu in range(max(1, count))]
    if not count and not lines[0].strip():
        return Text("not known")
    text = Text(no_wrap=True)
    for vcpu, marks in enumerate(lines):
        text.append(f"{vcpu if count else '':>2} {marks}\n", "red")
    text.append("░▒▓█ for a page, p connection broken,\nr recovery, e engine died, s switch-over")
    return text


def _heat(series: Series, width: int) -> "Text":
    """Time to the right, latency upwards: each row is four times as long as the one below."""
    from rich.text import Text

    columns = series.latencies()[-(width - 8) :]
    most = max((max(column, default=0) for column in columns), default=0)
    if not most:
        return Text("no fault yet")
    text = Text(no_wrap=True)
    for low in range(18, -1, -2):
        counts = [sum(column[low : low + 2]) for column in columns]
        marks = "".join(
            _SHADES[min(4, 1 + count * 4 // (2 * most + 1))] if count else " " for count in counts
        )
        text.append(f"{_duration(1 << low):>7} ")
        text.append(marks + "\n", "yellow")
    return text


def _duration(us: int) -> str:
    if us < 1000:
        return f"{us} us"
    return f"{us / 1000:.0f} ms" if us < 1_000_000 else f"{us / 1e6:.0f} s"
