"""How much to send in one go: as much as takes a moment."""

import time
from collections.abc import Callable

LEAST_BYTES = 1 << 20

MOMENT_S = 0.01
"""Between two goes the user's orders are looked at, such as to switch to postcopy."""


class BatchSize:
    """Follows the rate at which bytes go out; grows by and by, and shrinks at once.

    :param most_bytes: never more than that.
    :param clock: seconds, never going back.
    """

    def __init__(self, most_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes = most_bytes
        self._clock = clock
        self._began = clock()
        self.bytes = LEAST_BYTES

    def begin(self) -> None:
        """What is sent is sent from now on."""
        self._began = self._clock()

    def end(self, sent_bytes: int) -> None:
        """So much has gone out since :meth:`begin`, which may be less than was wanted."""
        elapsed_s = self._clock() - self._began
        if elapsed_s > MOMENT_S:
            self.bytes = max(LEAST_BYTES, min(self.bytes, int(sent_bytes * MOMENT_S / elapsed_s)))
        elif elapsed_s < MOMENT_S / 2 and sent_bytes >= self.bytes:
            self.bytes = min(2 * self.bytes, self._most_bytes)
