"""What is unmapped is missing from this process's page tables, and nothing else is."""

import os

import numpy as np
import pytest

from postcopy.abi.pagemap import PageCategory
from postcopy.errors import KernelError
from postcopy.kernel import calls, memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.pagemap import PagemapScanner, unmap

PAGES = 3000


@pytest.fixture
def memory():
    fd = memfd.create("unmap", PAGES * 4096)
    with Mapping.shared(fd, PAGES * 4096) as mapping:
        os.close(fd)
        mapping.view()[:] = 7
        yield mapping


def mapped(memory):
    with PagemapScanner(0) as scanner:
        found = scanner.scan(
            memory.address,
            memory.address + memory.length,
            protect=False,
            categories=PageCategory.PRESENT,
        )
    pages = (found - np.uint64(memory.address)) // np.uint64(4096)
    return {page for start, end in pages.tolist() for page in range(start, end)}


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_only_what_was_named(memory, monkeypatch, kernel):
    if kernel == "old":

        def refuse(name, *_):
            raise KernelError(name, 22)

        monkeypatch.setattr(calls, "syscall", refuse)
    odd = np.arange(1, PAGES, 2, dtype=np.uint64)
    ranges = np.stack((odd * 4096 + memory.address, np.full(len(odd), 4096, np.uint64)), axis=1)
    unmap(ranges)
    assert mapped(memory) == set(range(0, PAGES, 2))
    assert memory.view()[4096] == 7  # the file has it still
