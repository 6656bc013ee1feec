"""Orders that may take longer than the caller is to wait."""

import threading
from collections.abc import Callable
from typing import Final

from postcopy.errors import HostCannot, WrongState
from postcopy.kernel import threads

AT_ONCE_S: Final = 5.0
"""How long a caller waits: nearly every order is carried out, or has failed, long before."""


class _Pending:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: Exception | None = None
        self.is_late = False


class BackgroundOrder:
    """Carries out one order at a time; any thread may give it.

    :param at_once_s: how long the caller of :meth:`run` waits at most.
    """

    def __init__(self, at_once_s: float = AT_ONCE_S) -> None:
        self._at_once_s = at_once_s
        self._lock = threading.Lock()
        # Under the lock, as is whether an order is late.
        self._current: _Pending | None = None

    def run(self, work: Callable[[], None], failed_late: Callable[[Exception], None]) -> None:
        """Have a thread carry out an order; return when it has, or has taken too long to wait for.

        :param failed_late: gets the error of an order that was not waited for any more.
        :raises WrongState: the one before is still being carried out.
        :raises HostCannot: there can be no more threads.
        :raises PostcopyError: the order has failed.
        """
        with self._lock:
            if self._current is not None:
                raise WrongState("the same was ordered before, and is still being carried out")
            self._current = pending = _Pending()
        arguments = (pending, work, failed_late)
        thread = threading.Thread(target=self._work, args=arguments, name="errand", daemon=True)
        try:
            threads.start(thread)
        except HostCannot:
            with self._lock:
                self._current = None
            raise
        pending.done.wait(self._at_once_s)
        with self._lock:
            pending.is_late = not pending.done.is_set()
        if pending.error is not None and not pending.is_late:
            raise pending.error

    def _work(
        self,
        pending: _Pending,
        work: Callable[[], None],
        failed_late: Callable[[Exception], None],
    ) -> None:
        error: Exception | None = None
        try:
            work()
        except Exception as failure:  # a fault of ours, too: its user must hear of it
            error = failure
        with self._lock:
            self._current = None
            pending.error = error
            pending.done.set()
            is_late = pending.is_late
        if is_late and error is not None:
            failed_late(error)
