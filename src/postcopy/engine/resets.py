"""An engine's orders about a reset point: see :mod:`postcopy.snapshot.reset`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from postcopy.errors import WrongState
from postcopy.link.guest_proxy import GuestProxy, encode_states
from postcopy.link.rpc import Handler
from postcopy.snapshot.reset import Reset


class Resets:
    """Keeps the memory of one reset point, and puts it back whenever it is told to.

    :param guest: whose memory it is.
    """

    def __init__(self, guest: Callable[[], GuestProxy]) -> None:
        self._guest = guest
        self._reset: Reset | None = None

    def handlers(self) -> Mapping[str, Handler]:
        """The orders, by name."""
        return {
            "reset_to_image": self._to_image,
            "reset_to_now": self._to_now,
            "keep_rest": self._keep_rest,
            "adopt_reset": self._adopt,
            "put_back": self._put_back,
        }

    def _to_image(self, **arguments: Any) -> dict[str, Any]:
        """The point is an image; return what the guest's process must keep of it."""
        reset = self._make(**arguments)
        reset.watch()
        return {
            "identity": reset.identity,
            "needs_file": reset.needs_file,
            "states": encode_states(reset.devices),
        }

    def _to_now(self, **arguments: Any) -> int:
        """The point is close: return how many bytes have been copied."""
        return self._make(**arguments).keep()

    def _keep_rest(self) -> int:
        """The guest stands still, at its point."""
        return self._job.keep_rest()

    def _put_back(self, *, everything: bool) -> int:
        return self._job.put_back(everything=everything)

    def _adopt(self, **arguments: Any) -> None:
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
