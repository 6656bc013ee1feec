"""An image: a guest's memory and devices in a file, whatever the file's format.

Memory is read only on request.  A file is hostile input: each fault of it is an :class:`ImageError` with
the offset, and each size in it is checked before memory is allocated for it.

An image is opened by :func:`postcopy.image.formats.open_image`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from postcopy.errors import ImageError
from postcopy.guest import DeviceState
from postcopy.image.file import Damage
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Mask
from postcopy.stream.file_records import Configuration, DeviceSection
from postcopy.stream.mapped_ram import CAPABILITY

if TYPE_CHECKING:
    from postcopy.image.libvirt import LibvirtHeader

PageRows = npt.NDArray[np.uint8]

LARGEST_RAM_BYTES = 16 << 40
"""A larger RAM size is refused: a mask of its pages alone would be 4 GiB."""


@dataclass(frozen=True, slots=True)
class ImageBlock:
    """One RAM block of an image.

    :ivar page_size_bytes: of the writer's host pages.  Streams tell it only of huge pages, and only if
        the writer had the capability ``postcopy-ram`` on; 4096 otherwise.
    """

    name: str
    size_bytes: int
    page_size_bytes: int = field(default=TARGET_PAGE_BYTES, compare=False)

    @property
    def pages(self) -> int:
        """Its number of pages of 4 KiB."""
        return self.size_bytes // TARGET_PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Contents:
    """An image without its memory.

    :ivar sections: every FULL section, in the order of the file.
    :ivar early_sections: how many of them are in front of the memory.
    :ivar ram_section_id: of the sections of the memory.
    :ivar ram_ended: whether the memory has an END section.
    :ivar description: the JSON at the end of the stream, or ``None``.
    """

    configuration: Configuration
    blocks: tuple[ImageBlock, ...]
    sections: tuple[DeviceSection, ...]
    early_sections: int
    ram_section_id: int
    description: str | None
    ram_ended: bool


class Image(ABC):
    """A guest at one point in time, read-only.  Any thread may read it.

    :param path: the file, for messages.
    :param form: ``mapped-ram``, ``stream`` or ``chunks``.
    :ivar configuration: as a plain stream of the guest begins with: the capability ``mapped-ram``, which
        is the file's, is not in it.
    :ivar sections: every FULL section, payloads verbatim, in the order of the file.
    :ivar early_sections: how many of them a stream has in front of the memory (``virtio-mem``).
    :ivar ram_section_id: of the memory; no other section has it.
    :ivar libvirt: what ``virsh save`` has put in front of the stream.
    """

    def __init__(self, path: Path, form: str, contents: Contents) -> None:
        self.path = path
        self.format = form
        kept = tuple(name for name in contents.configuration.capabilities if name != CAPABILITY)
        self.configuration = replace(contents.configuration, capabilities=kept)
        self.machine_name = self.configuration.machine
        self.uuid = self.configuration.uuid
        self.blocks: Sequence[ImageBlock] = contents.blocks
        self.sections: Sequence[DeviceSection] = contents.sections
        self.early_sections = contents.early_sections
        self.ram_section_id = contents.ram_section_id
        self.libvirt: LibvirtHeader | None = None
        self.devices: Sequence[DeviceState] = [
            DeviceState(each.name, each.instance, each.version, each.payload)
            for each in contents.sections
        ]
        self.description = contents.description
        self._blocks = {block.name: block for block in contents.blocks}

    @abstractmethod
    def has_data(self, block_name: str) -> Mask:
        """Return the pages that the file has; all others are zero.  Shape ``(pages,)``.

        :raises KeyError: there is no such block.
        """

    def address(self, block_name: str) -> int:
        """Return where the block is mapped in this process, for the kernel to copy from; 0: nowhere.

        Only pages that have data are valid.  No code may touch the mapping: see
        :mod:`postcopy.image.file`.

        :raises KeyError: there is no such block.
        """
        _ = self._blocks[block_name]
        return 0

    def bits(self, block_name: str) -> npt.NDArray[np.uint8] | None:
        """Return :meth:`has_data` as packed bits, the lowest first, if the file has it so.

        :raises KeyError: there is no such block.
        """
        del block_name
        return None

    @abstractmethod
    def _copy(self, block: ImageBlock, first: int, rows: PageRows) -> None:
        """Copy the pages with data from ``first`` on into ``rows``, which is all zero."""

    @abstractmethod
    def locate(self, start: int, end: int) -> tuple[str, int] | None:
        """Find the memory in the bytes ``start`` to ``end`` (not included) of the file.

        :return: the block, and the offset in it of the first byte, in bytes; ``None`` if there is no
            memory.
        """

    def fixed_pages(self) -> list[tuple[int, int]]:
        """Return the ranges of bytes of the file that are pages and nothing else."""
        return []

    def damages(self) -> Iterator[Damage]:
        """Find damaged memory that is not in the image's own file."""
        return iter(())

    @abstractmethod
    def close(self) -> None:
        """Close the file, once the last view is gone.  Harmless when closed."""

    def block(self, name: str) -> ImageBlock:
        """Find a block.

        :raises KeyError: there is no such block.
        """
        return self._blocks[name]

    def device_bytes(self) -> bytes:
        """Encode the FULL sections behind the memory, heads and footers included, as the file has them.

        With ``LISTEN`` in front and ``RUN`` behind, they are what a postcopy source packages.
        """
        from postcopy.stream.encoder import device_section  # a restore does not need it

        return b"".join(device_section(each) for each in self.sections[self.early_sections :])

    @property
    def ram_bytes(self) -> int:
        """The sum of the sizes of all blocks."""
        return sum(block.size_bytes for block in self.blocks)

    def read(self, block_name: str, first_page: int, count: int) -> PageRows:
        """Copy pages of a block, zeros filled in; shape ``(count, 4096)``.

        :raises KeyError: there is no such block.
        :raises IndexError: the pages are not all in the block.
        :raises ImageError: they cannot be read.
        """
        block = self._blocks[block_name]
        if first_page < 0 or count < 0 or first_page + count > block.pages:
            end = first_page + count
            raise IndexError(
                f"pages {first_page} to {end} of {block.name}, which has {block.pages}"
            )
        rows = np.zeros((count, TARGET_PAGE_BYTES), np.uint8)
        self._copy(block, first_page, rows)
        return rows

    def fail(self, message: str, offset: int | None = None) -> ImageError:
        """Make an error about this image."""
        return ImageError(self.path, message, offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
