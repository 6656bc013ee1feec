"""An engine's orders about a reset point: see :mod:`postcopy.reset.reset`."""

from collections.abc import Sequence
from typing import Any

from postcopy.engine.context import EngineContext
from postcopy.errors import WrongState
from postcopy.link.protocol import encode_states
from postcopy.reset.reset import Reset


class Resets:
    """Keeps the memory of one reset point, and puts it back whenever it is told to."""

    def __init__(self, context: EngineContext) -> None:
        self._guest = context.guest
        self._reset: Reset | None = None

    def reset_to_image(self, **arguments: Any) -> dict[str, Any]:
        """The point is an image; return what the guest's process must keep of it."""
        reset = self._make(**arguments)
        reset.watch()
        return {
            "identity": reset.identity,
            "needs_file": reset.needs_file,
            "states": encode_states(reset.devices),
        }

    def reset_to_now(self, **arguments: Any) -> int:
        """The point is close: return how many bytes have been copied."""
        return self._make(**arguments).keep()

    def keep_rest(self) -> int:
        """The guest stands still, at its point."""
        return self._job.keep_rest()

    def put_back(self, *, everything: bool) -> int:
        """Put the memory back: what was written since, or everything."""
        return self._job.put_back(everything=everything)

    def adopt_reset(self, **arguments: Any) -> None:
        """Stand in for an engine that has died."""
        self._make(**arguments).watch()

    def _make(self, fds: Sequence[int], **arguments: Any) -> Reset:
        self._reset = reset = Reset(self._guest(), fds, **arguments)
        return reset

    @property
    def _job(self) -> Reset:
        if self._reset is None:
            raise WrongState("this engine keeps no reset point")
        return self._reset
