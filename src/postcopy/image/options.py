"""Options and timings of a snapshot, for modules that do not read images themselves."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Form = Literal["mapped-ram", "stream"]


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """The kind of image that a snapshot makes.

    :ivar form: the format, unless the memory goes into a store of chunks.
    :ivar compressed: put the memory into a store beside the image.
    :ivar parent: put the memory into the store of this image.
    :ivar command: QEMU's command line, for the manifest.
    """

    form: Form = "mapped-ram"
    compressed: bool = False
    parent: Path | None = None
    command: str | None = None

    @property
    def chunked(self) -> bool:
        """Whether the memory goes into a store."""
        return self.compressed or self.parent is not None


@dataclass(frozen=True, slots=True)
class SnapshotTimings:
    """Times of a snapshot so far; ``None`` where the machine has not measured.

    :ivar started: ``time.monotonic()`` at the order.
    """

    started: float
    pause_us: int | None = None
    longest_stall_us: int | None = None

    @property
    def total_ms(self) -> int:
        """Whole milliseconds until now."""
        return round((time.monotonic() - self.started) * 1000)
