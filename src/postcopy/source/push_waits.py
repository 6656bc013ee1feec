"""What a push does while it waits: it reads what the destination says, if it has the turn."""

import threading

from postcopy.source.flight_window import FlightWindow
from postcopy.source.return_path import ReturnPath


class PushWaits:
    """Waits of one push, each of them broken off when it is over.

    :param over: set when nothing can be sent any more.
    :param answers: None: nobody answers.
    """

    def __init__(self, over: threading.Event, answers: ReturnPath | None) -> None:
        self._over = over
        self._answers = answers

    def read(self, *, here: bool) -> None:
        """Choose whether the return path is read here from now on, or by its own thread."""
        if self._answers is None:
            return
        turn = self._answers.turn
        if here and not turn.is_borrowed:
            turn.borrow()
        elif not here and turn.is_borrowed:
            turn.give_back()

    def look(self) -> None:
        """Take what has come by now, if it is read here."""
        if self._answers is not None:
            self._answers.look()

    def wait(self, timeout: float) -> bool:
        """Sleep so many seconds, or until something has come; return whether it is over."""
        if self._answers is None or not self._answers.turn.is_borrowed:
            return self._over.wait(timeout)
        self._answers.look(timeout)
        return self._over.is_set()

    def is_set(self) -> bool:
        """Whether it is over."""
        return self._over.is_set()

    def wait_for(self, window: FlightWindow) -> None:
        """Sleep until another batch may be sent."""
        while not window.is_open:
            if self._answers is None or not self._answers.look(None):
                window.wait()
