"""Notices an engine that hangs without being dead.

An engine at work says that it lives, from a thread that does nothing else: that stops only when the whole
process does, by a signal or by a thread that never lets go of the interpreter.  A guest whose pages such
an engine owes waits for ever, so the engine is ended, and counts as dead.

Time is counted in looks, a second apart, of which none is made while this process or the whole host stands
still.  What a busy host takes from the engine it takes from the looks, too.
"""

import threading
from collections.abc import Callable
from typing import Final

from postcopy.kernel import threads
from postcopy.link.protocol import Beats, WatchCommands
from postcopy.link.rpc import Link, handlers

HANG_LOOKS: Final = 20
"""An engine that has been silent for so many looks hangs.  As long as a CPU may stand still before Linux
calls that a lockup: busy hosts keep a process from running for seconds, and the largest guests' memory
keeps calls of its kernel for some more."""

_FIRST_LOOKS: Final = 60
"""The same for one that has not been heard yet: it may be reading its programme from a slow disk."""

_LOOK_S: Final = 1.0


class Watchdog(Beats):
    """Watches one engine.

    :param link: to the engine.
    :param looks: it hangs when it has been silent for so many.
    :param hangs: called, from a thread of its own, with the seconds of silence.
    """

    def __init__(self, link: Link, looks: int, hangs: Callable[[float], None]) -> None:
        self._link = link
        self._looks = looks
        self._hangs = hangs
        # Written by the link's reader alone.
        self._beats = 0

    def start(self) -> None:
        """Have the engine say that it lives, and listen for that until the link ends.

        :raises HostCannot: there can be no more threads.
        """
        self._link.serve(handlers(Beats, self))
        self._link.note(WatchCommands.say_alive)
        threads.start(threading.Thread(target=self._watch, name="watchdog", daemon=True))

    def alive(self) -> None:
        self._beats += 1

    def _watch(self) -> None:
        heard, silent = 0, 0
        while not self._link.wait_over(_LOOK_S):
            if self._beats != heard or self._link.is_taking:
                heard, silent = self._beats, 0
                continue
            silent += 1
            if silent >= (self._looks if heard else max(self._looks, _FIRST_LOOKS)):
                self._hangs(silent * _LOOK_S)
                return
