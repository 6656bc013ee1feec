"""Which failures of a kernel call pass, and for how long the call is made again.

A host that is short of memory for a moment (``ENOMEM``, ``ENOBUFS``), a lock that is being waited for
(``EAGAIN``) and a signal (``EINTR``) are no reason to end a migration.  All calls of
:mod:`postcopy.kernel`, and those that carry a channel's bytes, are made again then, with short waits in
between, until they succeed or the failure has lasted.  What lasts, and every other failure, is the
caller's to deal with.
"""

import errno
import threading
import time
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

PASSES: Final = frozenset({errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.ENOBUFS})

LASTING_S: Final = 4.0
"""A failure that has lasted for so long does not pass."""

_FIRST_WAIT_S: Final = 0.0002
_LONGEST_WAIT_S: Final = 0.05


class Patience:
    """The patience for one call; several that follow one another may share it.

    :param passes: the errnos that are outlived.
    :param stop: ends the waits, and the patience; None: nothing does but the time.
    """

    __slots__ = ("_passes", "_stop", "_until_s", "_wait_s")

    def __init__(
        self, passes: frozenset[int] = PASSES, stop: threading.Event | None = None
    ) -> None:
        self._passes = passes
        self._stop = stop
        self._until_s = 0.0
        self._wait_s = 0.0

    def outlives(self, error: int) -> bool:
        """Wait a moment after a failure; return whether to make the call again.

        :param error: the errno that it failed with.
        """
        if error not in self._passes or (self._stop is not None and self._stop.is_set()):
            return False
        now_s = time.monotonic()
        if not self._until_s:
            self._until_s = now_s + LASTING_S
            return True  # most have passed by then: at once
        if now_s >= self._until_s:
            return False
        self._wait_s = min(max(2 * self._wait_s, _FIRST_WAIT_S), _LONGEST_WAIT_S)
        if self._stop is None:
            time.sleep(self._wait_s)
        else:
            self._stop.wait(self._wait_s)
        return True


def persist(
    call: Callable[Parameters, Result], *arguments: Parameters.args, **named: Parameters.kwargs
) -> Result:
    """Make a call for which Python has a function, such as :func:`os.pread`, until it does not fail so.

    Not for :func:`os.fsync`: the kernel tells of lost bytes once, and the next call succeeds.

    :raises OSError: what does not pass.
    """
    waits: Patience | None = None
    while True:
        try:
            return call(*arguments, **named)
        except OSError as error:
            waits = waits or Patience()
            if not waits.outlives(error.errno or 0):
                raise


NONE: Final = frozenset[int]()
"""Nothing passes: for calls that are only advice, and for those whose failure is an answer."""

SIGNALS: Final = frozenset({errno.EINTR})
"""For calls that want memory which may well not be there: that is for the caller to say at once."""
