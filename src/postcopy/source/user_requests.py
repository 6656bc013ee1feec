"""What the user has asked for meanwhile: set by calls of the monitor, checked by the source."""

import threading


class UserRequests:
    """The requests of one job; none is taken back.

    ``interrupt`` is set with each of them: a thread that waits, for the bandwidth limit for example,
    checks them.
    """

    def __init__(self) -> None:
        self.interrupt = threading.Event()
        self._postcopy = threading.Event()
        self._cancel = threading.Event()
        self._proceed = threading.Event()

    def postcopy(self) -> None:
        """Switch to postcopy as soon as possible."""
        self._set(self._postcopy)

    def cancel(self) -> None:
        """Cancel: the guest stays here."""
        self._set(self._cancel)

    def proceed(self) -> None:
        """Go on from ``pre-switchover``."""
        self._set(self._proceed)

    @property
    def postcopy_wanted(self) -> bool:
        """Whether postcopy was asked for."""
        return self._postcopy.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether the migration was cancelled."""
        return self._cancel.is_set()

    def wait_to_proceed(self) -> None:
        """Wait for :meth:`proceed` or :meth:`cancel`."""
        while not (self._proceed.is_set() or self._cancel.is_set()):
            self.interrupt.wait()
            self.interrupt.clear()

    def _set(self, request: threading.Event) -> None:
        request.set()
        self.interrupt.set()
