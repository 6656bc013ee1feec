"""Subscribers of trace points, by which a test lets an engine die or wait at a named step.

An engine that is killed from outside dies wherever it happens to be.  To prove that nothing is lost at a
certain step it has to die at that very step: so it kills itself with SIGKILL at the one that is named.

Engines inherit what to do in their environment: see :func:`kill_at` and :func:`stall_at`.
"""

import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

from postcopy.trace import CALL_VARIABLE

_KILL = "TEST_KILL_POINT"
_STALL = "TEST_STALL_POINT"
_TESTS = Path(__file__).resolve().parent.parent


def kill_at(point: str, marker: Path | None = None) -> dict[str, str]:
    """The environment in which an engine dies at a step.

    :param marker: kill only while this file is there, and remove it first: the engine that takes over
        does not die in its turn.
    """
    return _subscribed(_KILL, point if marker is None else f"{point}@{marker}")


def stall_at(point: str, path: Path) -> dict[str, str]:
    """The environment in which an engine waits at a step, while a Unix socket at ``path`` keeps it.

    An engine that finds no listener there goes on.
    """
    return _subscribed(_STALL, f"{point}@{path}")


def unsubscribed() -> tuple[str, ...]:
    """The variables of both, to take away."""
    return (CALL_VARIABLE, _KILL, _STALL)


def _subscribed(name: str, value: str) -> dict[str, str]:
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    found = os.pathsep.join(dict.fromkeys([str(_TESTS), *filter(None, paths)]))
    return {CALL_VARIABLE: f"{__name__}:take", name: value, "PYTHONPATH": found}


def take(point: str, _fields: Mapping[str, object]) -> None:
    """What an engine calls at each step."""
    stall, kill = os.environ.get(_STALL), os.environ.get(_KILL)
    if stall is not None:
        _stall(point, *stall.split("@", 1))
    if kill is not None:
        _kill(point, *kill.partition("@")[::2])


def _stall(point: str, wanted: str, path: str) -> None:
    if point != wanted:
        return
    with socket.socket(socket.AF_UNIX) as waiting:
        try:
            waiting.connect(path)
        except OSError:
            return  # the test lets no other engine wait
        waiting.recv(1)


def _kill(point: str, wanted: str, marker: str) -> None:
    if point != wanted:
        return
    if marker:
        try:
            Path(marker).unlink()
        except FileNotFoundError:
            return  # it has done its work
    os.kill(os.getpid(), signal.SIGKILL)
