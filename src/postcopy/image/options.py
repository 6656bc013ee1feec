"""What kind of snapshot is wanted, and what it has cost: for those who do not read images themselves."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Form = Literal["mapped-ram", "stream"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What kind of image is to come of it.

    :ivar form: the format, unless the memory goes into a store of chunks.
    :ivar compressed: put the memory into a store beside the image.
    :ivar parent: put it into the store of this image.
    """

    form: Form = "mapped-ram"
    compressed: bool = False
    parent: Path | None = None

    @property
    def chunked(self) -> bool:
        """Whether the memory goes into a store."""
        return self.compressed or self.parent is not None


@dataclass(frozen=True, slots=True)
class Cost:
    """What it has cost the guest so far; ``None`` where nobody measured.

    :ivar started: ``time.monotonic()`` when it was asked for.
    """

    started: float
    pause_us: int | None = None
    longest_stall_us: int | None = None

    @property
    def total_ms(self) -> int:
        """Whole milliseconds until now."""
        return round((time.monotonic() - self.started) * 1000)
