"""How much to send in one go: as much as takes a moment."""

import time
from collections.abc import Callable

LEAST_BYTES = 1 << 20

MOMENT_S = 0.01
"""Between two goes the user's requests are looked at, such as to switch to postcopy."""


class BatchSize:
    """Follows the rate at which bytes go out; grows by and by, and shrinks at once.

    :param most_bytes: never more than that.
    :param clock: seconds, never going back.
    :param least_bytes: what it begins with, and never less than that.
    :param moment_s: what one go should not exceed.
    """

    def __init__(
        self,
        most_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        least_bytes: int = LEAST_BYTES,
        moment_s: float = MOMENT_S,
    ) -> None:
        self._most_bytes = most_bytes
        self._least_bytes = least_bytes
        self._moment_s = moment_s
        self._clock = clock
        self._began = clock()
        self.bytes = least_bytes

    def begin(self) -> None:
        """What is sent is sent from now on."""
        self._began = self._clock()

    def end(self, sent_bytes: int) -> None:
        """So much has gone out since :meth:`begin`, which may be less than was wanted."""
        elapsed_s = self._clock() - self._began
        if elapsed_s > self._moment_s:
            fitting = int(sent_bytes * self._moment_s / elapsed_s)
            self.bytes = max(self._least_bytes, min(self.bytes, fitting))
        elif elapsed_s < self._moment_s / 2 and sent_bytes >= self.bytes:
            self.bytes = min(2 * self.bytes, self._most_bytes)
