"""A guest that goes back to an earlier point of its life: what it cost."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from postcopy.client.connection import Connection
from postcopy.errors import ChannelBroken, Refused


@dataclass(frozen=True, slots=True)
class ResetPoint:
    """A point to go back to has been set.

    :ivar pause_us: how long the guest stood still, in microseconds.
    :ivar copied_bytes: of its memory, copied while it ran and then; 0 if the point is an image.
    """

    pause_us: int
    copied_bytes: int
    _connection: Connection = field(repr=False, compare=False)

    @classmethod
    async def set(cls, connection: Connection, arguments: Mapping[str, Any]) -> "ResetPoint":
        """Do ``x-reset-point``.

        :raises Refused: it cannot be, or not now.
        """
        answer = await connection.execute("x-reset-point", arguments)
        return cls(answer["pause-us"], answer["copied-bytes"], connection)

    async def reset(self) -> "Reset":
        """Take the guest back to its point: memory, devices and time; as often as wanted.

        :raises Refused: there is no point, or an engine cannot finish it; the text says which.
        """
        return Reset.of(await self._connection.execute("x-reset"))

    async def end(self) -> None:
        """Give the point up; the guest runs on as it is.

        :raises Refused: there is none.
        """
        await self._connection.execute("x-reset-end")

    async def close(self) -> None:
        """Give the point up if it is still there, as ``async with`` does at its end."""
        with contextlib.suppress(Refused, ChannelBroken):
            await self.end()


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
