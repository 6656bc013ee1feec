"""The host's pools of huge pages: whether one has as many as are needed, and what to do if not.

Source: the kernel's ``Documentation/admin-guide/mm/hugetlbpage.rst``.
"""

from pathlib import Path
from typing import Final

from postcopy.errors import HostCannot

POOLS: Final = Path("/sys/kernel/mm/hugepages")


def check_pool(pages: int, page_size_bytes: int) -> None:
    """Check that so many pages can be reserved; another process may still take them first.

    Pages that others have reserved are not free.  A pool may grow by itself (``nr_overcommit_hugepages``).

    :raises HostCannot: how many are missing; the cure is the command that adds them.
    """
    pool = _pool(page_size_bytes)
    surplus = _number(pool, "surplus_hugepages")
    growth = max(0, _number(pool, "nr_overcommit_hugepages") - surplus)
    if pages > _free(pool) + growth:
        raise lacking(pages, page_size_bytes)


def lacking(pages: int, page_size_bytes: int) -> HostCannot:
    """The error for a pool that has too few pages."""
    try:
        pool = _pool(page_size_bytes)
    except HostCannot as error:
        return error
    free = _free(pool)
    missing = max(1, pages - free)
    total = _number(pool, "nr_hugepages") - _number(pool, "surplus_hugepages") + missing
    return HostCannot(
        f"not enough free huge pages of {page_size_bytes >> 10} KiB: {pages} are needed, {free} are "
        f"free, {missing} are missing",
        f"echo {total} > {pool}/nr_hugepages",
    )


def _pool(page_size_bytes: int) -> Path:
    pool = POOLS / f"hugepages-{page_size_bytes >> 10}kB"
    if not pool.is_dir():
        raise HostCannot(
            f"this host has no huge pages of {page_size_bytes >> 10} KiB", "give another page size"
        )
    return pool


def _free(pool: Path) -> int:
    return max(0, _number(pool, "free_hugepages") - _number(pool, "resv_hugepages"))


def _number(pool: Path, name: str) -> int:
    return int((pool / name).read_text())
