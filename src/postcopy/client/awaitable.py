"""Results that can be awaited, or used in ``async with``, which closes them at the end."""

from collections.abc import Awaitable, Generator
from typing import Any, Generic, Protocol, TypeVar


class Closable(Protocol):
    """An object that can be closed."""

    async def close(self) -> None:
        """Release all resources; harmless when done."""


T = TypeVar("T", bound=Closable)


class AwaitableContext(Awaitable[T], Generic[T]):
    """``async with opened as it:``, or ``it = await opened``; only once."""

    def __init__(self, opened: Awaitable[T]) -> None:
        self._opened = opened
        self._it: T | None = None

    def __await__(self) -> Generator[Any, None, T]:
        return self._opened.__await__()

    async def __aenter__(self) -> T:
        self._it = await self._opened
        return self._it

    async def __aexit__(self, *_: object) -> None:
        assert self._it is not None
        await self._it.close()
