"""Runs cases of :mod:`faults.failing_journeys` in processes of their own, each with a deadline."""

import contextlib
import errno
import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fakes.huge_pages import reserved
from faults.failing_calls import ERRNOS, FROM_THEN_ON, TIMES, environment
from faults.failing_scene import HUGE, Case

DEADLINE_S = 120.0
PLACES = Path(__file__).parents[1], Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """How a case went.

    :ivar failed: how many calls were made to fail.
    :ivar seen: how many calls of each kind there were.
    :ivar told: what a user was told.
    :ivar wrong: what was not as it should be; "": all was.
    """

    case: Case
    failed: int = 0
    seen: dict[str, int] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    wrong: str = ""

    def __str__(self) -> str:
        return f"{self.case} ({self.failed} did): {self.wrong or list(self.told) or 'unseen'}"


class Runner:
    """One process after another, of which each does cases until one of them goes wrong."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = os.environ | environment(folder)
        self._environment["PYTHONPATH"] = os.pathsep.join(map(str, PLACES))
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, case: Case) -> Result:
        """Do one."""
        process = self._process = self._process or self._start()
        process.stdin.write(json.dumps(asdict(case)).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
        line = process.stdout.readline() if ready else b""
        if line:
            answer = json.loads(line)
            return Result(case, answer["failed"], answer["seen"], tuple(answer["told"]))
        if not ready:
            process.send_signal(signal.SIGABRT)  # which has it say where it is
        self.close()
        return Result(case, wrong=self._complaints() or "it hangs")

    def _start(self) -> subprocess.Popen[bytes]:
        with (self._folder / "complaints").open("wb") as complaints:
            return subprocess.Popen(
                [sys.executable, "-m", "faults.failing_journeys"],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
            )

    def _complaints(self) -> str:
        return (self._folder / "complaints").read_text(errors="replace")[-6000:]

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def host_pages(journey: str) -> contextlib.AbstractContextManager[None]:
    """What a journey needs of the host's pages of 2 MiB; skips where it has none to give."""
    return reserved(_HUGE_PAGES) if journey.endswith(HUGE) else contextlib.nullcontext()


_HUGE_PAGES = 130
"""Four guests of 64 MiB: a few journeys have another destination, and a guest's pages come back late."""


def draw(journey: str, seen: dict[str, int], seed: int) -> Iterator[Case]:
    """Cases of a journey in which so many calls of each kind are made, at random; endless."""
    numbers = random.Random(f"{journey} {seed}")
    while True:
        kind = numbers.choice(sorted(seen))
        # The first ones are those that are made once; later ones are most alike.
        first = numbers.choice((1, numbers.randint(1, seen[kind])))
        case = Case(journey, kind, numbers.choice(ERRNOS), first, numbers.choice(TIMES))
        # No signal comes for ever, and Python itself makes such a call again for as long as one does.
        if (case.error, case.times) != (errno.EINTR, FROM_THEN_ON):
            yield case
