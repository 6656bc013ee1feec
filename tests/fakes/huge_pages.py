"""Pages of 2 MiB for a test: added to the host's pool, and taken out again.

A pool of this size exists on every x86-64 Linux, whatever ``default_hugepagesz`` the host was
started with, which ``vm.nr_hugepages`` follows.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.waiting import wait_until

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
TIMEOUT_S = 20.0


@contextlib.contextmanager
def reserved(count: int) -> Iterator[None]:
    """``count`` free pages of 2 MiB, until the context ends; skips where the host has none to give.

    Whoever runs this at the same time adds as many as it needs, so that no one takes another's.
    """
    with contextlib.ExitStack() as stack:
        if can_add():
            added = _add(count)
            stack.callback(_add, -added)
            if added < count:
                pytest.skip(f"needs {count} pages of 2 MiB: this host has too little free memory "
                            "in one piece; echo 1 > /proc/sys/vm/compact_memory")  # fmt: skip
            # The pages of a guest that has just ended are counted until the kernel has them back.
            wait_until(lambda: free() >= count, TIMEOUT_S, f"{count} free pages of 2 MiB")
        elif free() < count:
            pytest.skip(f"needs {count} pages of 2 MiB: run as root, or "
                        f"echo {count} > {POOL}/nr_hugepages")  # fmt: skip
        yield


def can_add() -> bool:
    """Whether the size of the pool is ours to change: root's, and not in most containers."""
    try:
        with (POOL / "nr_hugepages").open("r+"):
            return True
    except OSError:
        return False


def free() -> int:
    """Pages that nobody uses and nobody has reserved."""
    numbers = [int((POOL / f"{name}_hugepages").read_text()) for name in ("free", "resv")]
    return numbers[0] - numbers[1]


def _add(count: int) -> int:
    """Change the size of the pool, and say by how many pages the kernel did it."""
    with (POOL / "nr_hugepages").open("r+") as pool:
        fcntl.flock(pool, fcntl.LOCK_EX)  # other processes read and write it too
        before = _size()
        pool.write(str(max(before + count, 0)))
        pool.flush()
        return _size() - before


def _size() -> int:
    """Pages of the pool, without those that leave it when a process that is ending lets go of them."""
    numbers = [int((POOL / f"{name}_hugepages").read_text()) for name in ("nr", "surplus")]
    return numbers[0] - numbers[1]
