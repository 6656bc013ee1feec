"""The terminal shows the figures of a sample, at any size."""

import io

import pytest
from rich.console import Console

from fakes.watching import samples
from postcopy.watch.terminal import PlainView, Series, screen


def shown(made, width, height):
    series = Series()
    for sample in made:
        series.add(sample)
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    console.print(screen(series, width, height), height=height)
    return console.file.getvalue()


@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 24), (120, 50), (300, 90)])
def test_it_fits_any_screen(width, height):
    made = samples()
    for count in (1, 2, 12, len(made)):
        text = shown(made[:count], width, height)
        assert text.count("\n") <= height
        assert "memory" in text


def test_it_has_the_figures():
    text = shown(samples()[:15], 160, 50)
    for words in ("12.0 MiB/s", "p99 0.26 ms", "downtime", "3.2 ms", "setup → active", "at-source"):
        assert words in text, words


def test_without_a_map_it_says_so():
    import dataclasses

    made = [
        dataclasses.replace(
            sample,
            map=None,
            latency=(),
            blocktime_us=(),
            blocktime_causes_us=None,
            downtime_ms=None,
        )
        for sample in samples()
    ]
    text = shown(made, 160, 50)
    assert "does not tell where its pages are" in text
    assert "no fault yet" in text
    assert "not known" in text


def test_it_has_what_vcpus_wait_for():
    text = shown(samples(), 160, 50)
    for words in ("(page 40.0, paused 32.0)", "p connection broken", "s switch-over"):
        assert words in text, words
    series = Series()
    for sample in samples():
        series.add(sample)
    assert series.timeline(1) == "         s" + "░" * 5 + "p" * 4
    assert series.timeline(2) == "         s" + " " * 9


def test_elsewhere_a_line_a_second(capsys):
    with PlainView() as view:
        for sample in samples():
            view.show(sample)
    lines = capsys.readouterr().out.splitlines()
    assert 5 <= len(lines) <= 12
    assert "waits for the last page" in lines[0]
