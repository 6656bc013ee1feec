"""Which huge pages a file has: a look allocates none."""

import os
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest

from fakes import huge_pages
from postcopy.errors import HostCannot
from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.memory.ram_block import RamBlock

SIZE = 2 << 20
PAGES = 12


class File:
    """A file of hugetlbfs that another process writes to, and the block that an engine has of it."""

    def __init__(self) -> None:
        self._fd = memfd.create("ram", PAGES * SIZE, huge_page_size=SIZE)
        self._guest = Mapping.shared(self._fd, PAGES * SIZE)
        region = Region(
            name="ram",
            size_bytes=PAGES * SIZE,
            page_size_bytes=SIZE,
            guest_address=0,
            host_address=0,
            fd=os.dup(self._fd),
        )
        self.block = RamBlock(region)

    def write(self, page: int) -> None:
        self._guest.write(page * SIZE + 12345, b"x")

    def discard(self, page: int) -> None:
        memfd.punch_hole(self._fd, page * SIZE, SIZE)

    @property
    def allocated(self) -> int:
        return os.fstat(self._fd).st_blocks * 512 // SIZE

    def close(self) -> None:
        self.block.close()
        self._guest.close()
        os.close(self._fd)


@pytest.fixture
def file() -> Iterator[File]:
    with huge_pages.reserved(PAGES):
        made = File()
        yield made
        made.close()


def found(file: File, start: int = 0, end: int = PAGES) -> list[int]:
    return (start + np.flatnonzero(file.block.has_data(start, end))).tolist()


def test_what_others_have_written_is_found_and_nothing_is_allocated(file):
    assert found(file) == []
    for page in (0, 3, 4, 11):
        file.write(page)
    assert found(file, 1, 4) == [3]
    assert found(file) == [0, 3, 4, 11]
    file.write(7)
    file.discard(3)
    assert found(file) == [0, 4, 7, 11]
    assert file.allocated == 4


def test_without_a_userfaultfd_all_count(file):
    with mock.patch.object(Userfaultfd, "open", side_effect=HostCannot("no", "none")):
        assert found(file) == list(range(PAGES))
    assert file.allocated == 0
