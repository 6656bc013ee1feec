"""What the user has asked for meanwhile: set by the monitor's calls, looked at by the source."""

import threading


class Orders:
    """Orders only ever appear; none is taken back.

    ``interrupt`` is set with each of them, so that whoever sleeps (for the bandwidth limit, say)
    looks up.
    """

    def __init__(self) -> None:
        self.interrupt = threading.Event()
        self._postcopy = threading.Event()
        self._cancel = threading.Event()
        self._proceed = threading.Event()

    def postcopy(self) -> None:
        """Switch to postcopy as soon as possible."""
        self._give(self._postcopy)

    def cancel(self) -> None:
        """Give up and leave the guest here."""
        self._give(self._cancel)

    def proceed(self) -> None:
        """Go on from ``pre-switchover``."""
        self._give(self._proceed)

    @property
    def postcopy_wanted(self) -> bool:
        """Whether postcopy was asked for."""
        return self._postcopy.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether the migration was cancelled."""
        return self._cancel.is_set()

    def wait_to_proceed(self) -> None:
        """Sleep until told to go on, or to cancel."""
        while not (self._proceed.is_set() or self._cancel.is_set()):
            self.interrupt.wait()
            self.interrupt.clear()

    def _give(self, order: threading.Event) -> None:
        order.set()
        self.interrupt.set()
