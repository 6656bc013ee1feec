"""What a user wants of a restore, and what its successor must know when an engine has died."""

import time
from dataclasses import dataclass, field
from typing import Literal

from postcopy.errors import Refused

Prefetch = Literal["auto", "off"]


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """How to restore.

    :ivar path: the image.
    :ivar lazy: run the guest first.
    :ivar prefetch: ``auto``: bring the recorded working set first, if there is one.
    :ivar record: add what the guest touches to the working set beside the image.
    :ivar began_ns: when it began, on the monotonic clock, which all processes share.
    :ivar identity: of the image as it was when it was first opened; empty before.
    :raises Refused: they do not go together.
    """

    path: str
    began_ns: int = field(default_factory=time.monotonic_ns)
    lazy: bool = False
    prefetch: Prefetch = "auto"
    record: bool = False
    identity: str = ""

    def __post_init__(self) -> None:
        if self.prefetch not in {"auto", "off"}:
            raise Refused(f"prefetch {self.prefetch!r} cannot be; give 'auto' or 'off'")
        if self.record and not self.lazy:
            raise Refused("a working set is recorded from faults: restore lazily to record it")
