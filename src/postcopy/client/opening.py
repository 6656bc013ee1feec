"""What is to be opened: ``await`` gives it, and ``async with`` gives it and closes it."""

from collections.abc import Awaitable, Generator
from typing import Any, Generic, Protocol, TypeVar


class Closable(Protocol):
    """What can be closed."""

    async def close(self) -> None:
        """Let go of everything; harmless when done."""


T = TypeVar("T", bound=Closable)


class Opening(Awaitable[T], Generic[T]):
    """``async with opening as it:``, or ``it = await opening``; once, either way."""

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
