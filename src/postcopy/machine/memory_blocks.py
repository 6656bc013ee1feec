"""The RAM blocks of a machine: what each is like, and what cannot be."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from postcopy.errors import Refused
from postcopy.kernel import memfd
from postcopy.kernel.huge_pages import check_pool
from postcopy.kernel.memory_directory import MemoryDirectory
from postcopy.stream.numbers import IGNORED_BLOCKS, LONGEST_NAME

SMALL_PAGE_BYTES: Final = 4096
HUGE_PAGE_BYTES: Final = 2 << 20
GIGANTIC_PAGE_BYTES: Final = 1 << 30

_PAGE_SIZES: Final = {
    SMALL_PAGE_BYTES: "4K",
    HUGE_PAGE_BYTES: "2M",
    GIGANTIC_PAGE_BYTES: "1G",
}
_BITS_PER_SECOND: Final = (10, 1)  # 10^9


@dataclass(frozen=True, slots=True)
class MemoryBlock:
    """One RAM block.

    :ivar name: what it is called on the wire; both ends must have the same.
    :ivar size_bytes: a multiple of 2 MiB and of ``page_size_bytes``.
    :ivar page_size_bytes: the unit in which it is missing, placed and discarded: 4 KiB, or 2 MiB or 1 GiB
        from the host's pool, reserved at the start.
    :ivar directory: where its file is, which has no name there; None: it is a memfd.
    """

    name: str
    size_bytes: int
    page_size_bytes: int = SMALL_PAGE_BYTES
    directory: str | None = None

    @classmethod
    def of(
        cls, name: str, size_bytes: int, page_size_bytes: int | None, directory: str | None
    ) -> "MemoryBlock":
        """Make one whose page size may be left to its directory.

        :raises Refused: the directory's files are no memory, or have pages of another size.
        """
        if directory is None:
            return cls(name, size_bytes, page_size_bytes or SMALL_PAGE_BYTES)
        found = MemoryDirectory.at(directory).page_size_bytes
        if page_size_bytes not in {None, found}:
            raise Refused(
                f"RAM block '{name}' has page size {_shown(page_size_bytes or 0)}, and the files in "
                f"{directory} have pages of {_shown(found)}; leave the page size out, or give another path"
            )
        return cls(name, size_bytes, found, directory)

    def check(self, offset_bytes: int) -> None:
        """Refuse what cannot be.

        :param offset_bytes: the sizes of all blocks before it.
        :raises Refused: what, why, and what would do.
        """
        what, size = f"RAM block '{self.name}'", self.page_size_bytes
        if not 0 < len(self.name.encode()) <= LONGEST_NAME or not self.name.isprintable():
            raise Refused(f"{what} cannot have this name; give 1 to {LONGEST_NAME} characters")
        if self.name in IGNORED_BLOCKS:
            raise Refused(f"{what} has the name of QEMU's firmware; give another name")
        if size not in _PAGE_SIZES:
            raise Refused(f"{what} cannot have pages of {_shown(size)}; give 4K, 2M or 1G")
        if self.size_bytes <= 0 or self.size_bytes % max(size, HUGE_PAGE_BYTES):
            raise Refused(
                f"{what} of {self.size_bytes} bytes is not a multiple of "
                f"{_shown(max(size, HUGE_PAGE_BYTES))}; give whole ones"
            )
        if offset_bytes % size:
            raise Refused(
                f"{what} would begin at guest address {offset_bytes:#x}, which is not a multiple of its "
                f"page size {_shown(size)}; name it before the blocks with smaller pages"
            )

    @property
    def warning(self) -> str | None:
        """What to tell its user: how long a vCPU waits for one of its pages, if they are of 1 GiB."""
        if self.page_size_bytes < GIGANTIC_PAGE_BYTES:
            return None
        times = ", ".join(
            f"{self.page_size_bytes * 8 / (gigabits * 10**9):.1f} s at {gigabits} Gbit/s"
            for gigabits in _BITS_PER_SECOND
        )
        return (
            f"RAM block '{self.name}' has pages of 1 GiB: in postcopy a vCPU that touches one that has not "
            f"come stands still for {times}; page-size=2M stands still for a 512th of that"
        )

    def create(self, *, transparent: bool) -> int:
        """Make its memory, which is one hole; return the descriptor.

        :param transparent: of 4 KiB pages: take 2 MiB wherever the kernel has them free.
        :raises HostCannot: the host has not so many huge pages.
        """
        if self.directory is not None:
            fd = MemoryDirectory.at(self.directory).create(self.size_bytes)
            return memfd.reserved(fd, self.size_bytes, self.page_size_bytes)
        if self.page_size_bytes > SMALL_PAGE_BYTES:
            return memfd.create(self.name, self.size_bytes, huge_page_size=self.page_size_bytes)
        make = memfd.create_transparent if transparent else memfd.create
        return make(self.name, self.size_bytes)


def check(blocks: Sequence[MemoryBlock]) -> None:
    """Refuse blocks that cannot be those of a machine.

    :raises Refused: what, why, and what would do.
    """
    offset, names = 0, set[str]()
    for block in blocks:
        block.check(offset)
        if block.name in names:
            raise Refused(f"RAM block '{block.name}' is given twice; give each a name of its own")
        names.add(block.name)
        offset += block.size_bytes


def check_host(blocks: Iterable[MemoryBlock]) -> None:
    """Refuse blocks for which this host lacks huge pages, or room in a directory.

    :raises HostCannot: what is missing, over all blocks, and the command that adds it.
    :raises Refused: a directory's files are no memory.
    """

    def page_size(block: MemoryBlock) -> int:
        return block.page_size_bytes

    for size, group in groupby(sorted(blocks, key=page_size), page_size):
        same = list(group)
        if size > SMALL_PAGE_BYTES:
            check_pool(_total(same) // size, size)
        for path in {block.directory for block in same} - {None}:
            needed = _total(block for block in same if block.directory == path)
            MemoryDirectory.at(str(path)).check_room(needed)


def _total(blocks: Iterable[MemoryBlock]) -> int:
    return sum(block.size_bytes for block in blocks)


def _shown(size_bytes: int) -> str:
    return _PAGE_SIZES.get(size_bytes, f"{size_bytes} bytes")
