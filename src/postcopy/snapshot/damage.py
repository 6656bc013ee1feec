"""A part of an image that is not what it was."""

from dataclasses import dataclass
from pathlib import Path

from postcopy.errors import ImageError


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes of a file that do not agree with their digest.

    :ivar offset, length_bytes: where in the file.
    :ivar block, block_offset: whose memory that is, from which of its bytes on; ``None`` where it is
        none: the list of blocks, the bitmaps, the devices.
    """

    path: Path
    offset: int
    length_bytes: int
    block: str | None = None
    block_offset: int | None = None

    def error(self) -> ImageError:
        """The error for it."""
        if self.block is None or self.block_offset is None:
            what = "no page of the guest, but what stands around them"
        else:
            what = f"block {self.block} from offset {self.block_offset:#x} on"
        return ImageError(
            self.path,
            f"{self.length_bytes} bytes do not agree with their digest: {what}",
            self.offset,
        )
