"""An engine's orders about a reset point: see :mod:`postcopy.reset.reset`."""

from collections.abc import Sequence

from postcopy.engine.context import EngineContext
from postcopy.errors import WrongState
from postcopy.link.protocol import ImagePoint, ResetCommands
from postcopy.reset.reset import Reset


class Resets(ResetCommands):
    """Keeps the memory of one reset point; see :class:`ResetCommands` for what each order does."""

    def __init__(self, context: EngineContext) -> None:
        self._guest = context.guest
        self._reset: Reset | None = None

    def reset_to_image(self, copies: Sequence[int], path: str) -> ImagePoint:
        self._reset = reset = Reset(self._guest(), copies, path)
        reset.watch()
        return ImagePoint(reset.identity, reset.needs_file, reset.devices)

    def reset_to_now(self, copies: Sequence[int]) -> int:
        self._reset = Reset(self._guest(), copies)
        return self._reset.keep()

    def keep_rest(self) -> int:
        return self._job.keep_rest()

    def put_back(self, *, everything: bool) -> int:
        return self._job.put_back(everything=everything)

    def adopt_reset(
        self, copies: Sequence[int], path: str | None = None, identity: str = ""
    ) -> None:
        self._reset = Reset(self._guest(), copies, path, identity)
        self._reset.watch()

    @property
    def _job(self) -> Reset:
        if self._reset is None:
            raise WrongState("this engine keeps no reset point")
        return self._reset
