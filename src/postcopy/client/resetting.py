"""A guest that goes back to an earlier point of its life: what it cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ResetPoint:
    """A point to go back to has been set.

    :ivar pause_us: how long the guest stood still, in microseconds.
    :ivar copied_bytes: of its memory, copied while it ran and then; 0 if the point is an image.
    """

    pause_us: int
    copied_bytes: int

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "ResetPoint":
        """What ``x-reset-point`` answers."""
        return cls(answer["pause-us"], answer["copied-bytes"])


@dataclass(frozen=True, slots=True)
class Reset:
    """A guest has gone back.

    :ivar pages: of 4 KiB that were put back.
    :ivar us: how long the guest stood still, in microseconds.
    :ivar whole: all memory was looked at, not only what was written: the first time after an image was
        made the point, or after the death of an engine.
    """

    pages: int
    us: int
    whole: bool

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "Reset":
        """What ``x-reset`` answers."""
        return cls(answer["pages"], answer["us"], answer["whole"])
