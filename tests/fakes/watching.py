"""Samples of a migration that never was, and the browser that shows them."""

import os
from pathlib import Path

import pytest

from postcopy.watch.recording import Header, Recorder
from postcopy.watch.sample import Sample

HEADER = Header("unix:a", "unix:b", "2026-11-30T12:00:00+00:00")
MIB = 1 << 20
STATUSES = ["setup", *["active"] * 8, "device", *["postcopy-active"] * 8, "completed", "completed"]


def samples(count: int = 20, vcpus: int = 2) -> list[Sample]:
    """A guest of 64 MiB that moves, a quarter of a second between two samples."""
    return [_sample(n, count, vcpus) for n in range(count)]


def _sample(n: int, count: int, vcpus: int) -> Sample:
    left = 64 * (count - 1 - n) // (count - 1)
    faults = max(0, n - 10) * 40
    return Sample(
        t_ms=250 * n,
        phase=STATUSES[n].split("-", maxsplit=1)[0],
        status=STATUSES[n],
        fraction=n / (count - 1),
        round=1,
        transferred_bytes=n * 3 * MIB,
        remaining_bytes=left << 20,
        total_bytes=64 * MIB,
        rate_bytes=12 * MIB,
        dirty_rate_bytes=5 * MIB,
        faults=faults,
        faults_per_s=160 if faults else 0,
        latency=tuple([0] * 7 + [faults] + [0] * 16),
        p50_us=200 if faults else None,
        p99_us=255 if faults else None,
        max_us=255 if faults else None,
        blocktime_us=tuple([faults * 200] * vcpus),
        blocktime_causes_us={
            "page": (min(faults, 200) * 200,) * vcpus,
            "paused": (max(0, faults - 200) * 200,) * vcpus,
        },
        downtime_ms=3.25 if n > 9 else None,
        source="memory is sent",
        destination="a guest's memory is arriving",
        waits_for="the last page",
        map={
            "side": "source",
            "cells": "s" * left + "i" * (64 - left),
            "pages": {"at-source": left * 256, "in-place": (64 - left) * 256},
        },
    )


def record(path: Path, made: list[Sample], header: Header = HEADER) -> Path:
    """Write them to a file."""
    recorder = Recorder(path, header)
    for sample in made:
        recorder.add(sample)
    recorder.close()
    return path


def browser_program() -> str:
    """Chromium, as ``.ci/install-browser`` has brought it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    home = Path(os.environ.get("POSTCOPY_BROWSER") or Path(cache) / "postcopy/browser")
    program = home / "debian/bin/chromium-headless-shell"
    if not program.exists():
        pytest.skip(f"needs {program}: run .ci/install-browser")
    return str(program)
