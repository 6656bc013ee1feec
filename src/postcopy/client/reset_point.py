"""A reset point of a guest, and the result of a reset."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from postcopy.client.qmp import QmpConnection
from postcopy.errors import ChannelBroken, Refused


@dataclass(frozen=True, slots=True)
class ResetPoint:
    """A point to which the guest can be reset.

    :ivar pause_us: how long the guest was stopped, in microseconds.
    :ivar copied_bytes: memory that was copied; 0 if the point is an image.
    """

    pause_us: int
    copied_bytes: int
    _connection: QmpConnection = field(repr=False, compare=False)

    @classmethod
    async def set(cls, connection: QmpConnection, arguments: Mapping[str, Any]) -> "ResetPoint":
        """Execute ``x-reset-point``.

        :raises Refused: not possible, or not now.
        """
        answer = await connection.execute("x-reset-point", arguments)
        return cls(answer["pause-us"], answer["copied-bytes"], connection)

    async def reset(self) -> "Reset":
        """Reset the guest to its point: memory, devices and time; any number of times.

        :raises Refused: there is no point, or an engine cannot finish it; the text says which.
        """
        return Reset.of(await self._connection.execute("x-reset"))

    async def end(self) -> None:
        """Remove the point; the guest runs on as it is.

        :raises Refused: there is none.
        """
        await self._connection.execute("x-reset-end")

    async def close(self) -> None:
        """Remove the point if it is still there, as ``async with`` does at its end."""
        with contextlib.suppress(Refused, ChannelBroken):
            await self.end()


@dataclass(frozen=True, slots=True)
class Reset:
    """The result of a reset.

    :ivar pages: of 4 KiB that were put back.
    :ivar us: how long the guest was stopped, in microseconds.
    :ivar whole: all memory was compared, not only written pages: the first time after an image was made
        the point, or after the death of an engine.
    """

    pages: int
    us: int
    whole: bool

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "Reset":
        """Make it of the answer to ``x-reset``."""
        return cls(answer["pages"], answer["us"], answer["whole"])
