"""Pages of 2 MiB for a test: added to the host's pool, and taken out again.

A pool of this size exists on every x86-64 Linux, whatever ``default_hugepagesz`` the host was
started with, which ``vm.nr_hugepages`` follows.
"""

import contextlib
import fcntl
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from fakes.waiting import wait_until

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
TIMEOUT_S = 20.0


@contextlib.contextmanager
def reserved(count: int) -> Iterator[None]:
    """``count`` free pages of 2 MiB, until the context ends; skips where the host has none to give.

    One process at a time: a pool that is made smaller gives up pages that are free, whoever has added them,
    before those of a guest that has just ended.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_TURN)
        if can_add():
            added, grown = _add(count)
            stack.callback(_remove, grown)
            if added < count:
                pytest.skip(f"needs {count} pages of 2 MiB: this host has too little free memory "
                            "in one piece; echo 1 > /proc/sys/vm/compact_memory")  # fmt: skip
            # The pages of a guest that has just ended are counted until the kernel has them back.
            wait_until(lambda: free() >= count, TIMEOUT_S, f"{count} free pages of 2 MiB")
        elif free() < count:
            pytest.skip(f"needs {count} pages of 2 MiB: run as root, or "
                        f"echo {count} > {POOL}/nr_hugepages")  # fmt: skip
        yield


@contextlib.contextmanager
def mounted(place: Path) -> Iterator[str]:
    """A hugetlbfs of 2 MiB pages at ``place``, until the context ends; skips without the right to mount."""
    if os.geteuid():
        pytest.skip("needs root, to mount a hugetlbfs of its own")
    place.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", place], check=True)
    try:
        yield str(place)
    finally:
        subprocess.run(["umount", place], check=True)


class _Turn:
    """This process's turn with the pool, from the first that enters to the last that leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Under the lock, which others of this process wait for while it is another's turn.
        self._inside = 0
        self._file: IO[str] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._file = (POOL / "free_hugepages").open()
                fcntl.flock(self._file, fcntl.LOCK_EX)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)  # a child may have the descriptor, too
                self._file.close()


_TURN = _Turn()


def can_add() -> bool:
    """Whether the size of the pool is ours to change: root's, and not in most containers."""
    try:
        with (POOL / "nr_hugepages").open("r+"):
            return True
    except OSError:
        return False


def free() -> int:
    """Pages that are neither in use nor reserved."""
    return _number("free") - _number("resv")


def _add(count: int) -> tuple[int, int]:
    """Add pages to the pool; return how many there are more, and by how many its set size grew.

    Pages that some process holds, and that would leave the pool with it (surplus), become pages of the
    pool by that.
    """
    with _changing() as pool:
        pages, size = _number("nr"), _size()
        pool.write(str(pages + count))
        pool.flush()
        return _number("nr") - pages, _size() - size


def _remove(grown: int) -> None:
    """Set the pool's size back; pages in use leave it when they are let go of."""
    with _changing() as pool:
        pool.write(str(max(_size() - grown, 0)))


@contextlib.contextmanager
def _changing() -> Iterator[IO[str]]:
    with (POOL / "nr_hugepages").open("r+") as pool:
        fcntl.flock(pool, fcntl.LOCK_EX)  # other processes change it, too
        yield pool


def _size() -> int:
    return _number("nr") - _number("surplus")


def _number(name: str) -> int:
    return int((POOL / f"{name}_hugepages").read_text())
