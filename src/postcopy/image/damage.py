"""A part of an image that is not what it was."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from postcopy.errors import ImageError

WRONG_DIGEST: Final = "do not agree with their digest"


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes of a file that do not agree with their digest, or cannot be read.

    :ivar offset, length_bytes: where in the file.
    :ivar block, block_offset: whose memory that is, from which of its bytes on; ``None`` where it is
        none: the list of blocks, the bitmaps, the devices.
    :ivar reason: what is wrong with them, as a predicate.
    """

    path: Path
    offset: int
    length_bytes: int
    block: str | None = None
    block_offset: int | None = None
    reason: str = WRONG_DIGEST

    def error(self) -> ImageError:
        """The error for it."""
        if self.block is None or self.block_offset is None:
            what = "no page of the guest, but what stands around them"
        else:
            what = f"block {self.block} from offset {self.block_offset:#x} on"
        return ImageError(
            self.path,
            f"{self.length_bytes} bytes {self.reason}: {what}",
            self.offset,
        )
