"""What a user wants of a restore, and what its successor must know when an engine has died."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

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
    """

    path: Path
    lazy: bool
    prefetch: Prefetch
    record: bool
    began_ns: int
    identity: str = ""

    @classmethod
    def of(cls, wire: Mapping[str, Any]) -> Self:
        """What came over the link.

        :raises Refused: they do not go together.
        """
        options = cls(
            path=Path(wire["path"]),
            lazy=wire.get("lazy", False),
            prefetch=cast("Prefetch", wire.get("prefetch", "auto")),
            record=wire.get("record", False),
            began_ns=wire["began_ns"],
            identity=wire.get("identity", ""),
        )
        if options.prefetch not in {"auto", "off"}:
            raise Refused(f"prefetch {options.prefetch!r} cannot be; give 'auto' or 'off'")
        if options.record and not options.lazy:
            raise Refused("a working set is recorded from faults: restore lazily to record it")
        return options
