"""Numbers of open files."""

import os
import resource
from collections.abc import Callable, Iterable
from typing import TypeVar

from postcopy.errors import HostCannot

_T = TypeVar("_T")


def open_all(open_one: Callable[[_T], int], items: Iterable[_T]) -> list[int]:
    """Open one file for each item; when one cannot be opened, none stays open."""
    fds: list[int] = []
    try:
        for item in items:
            fds.append(open_one(item))  # noqa: PERF401 - those that are open are to be known
    except BaseException:
        close_all(fds)
        raise
    return fds


def close_all(fds: Iterable[int]) -> None:
    """Close each of them."""
    for fd in fds:
        os.close(fd)


def lost(what: str, arrived: int, sent: int) -> HostCannot:
    """The error for descriptors that this process could not take."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    pid = os.getpid()
    return HostCannot(
        f"{what}: {arrived} of {sent} file descriptors arrived, since process {pid} may have {limit} "
        "files open",
        f"raise that limit ('prlimit --nofile=1024 --pid {pid}', 'ulimit -n') and try again",
    )
