"""``kill -USR2 PID``: a process that seems to hang says on its stderr what each of its threads does.

The kernel delivers, and no interpreter lock is needed for it: a process of which one thread holds that
lock and waits tells nevertheless.  Nothing else is disturbed.  See :mod:`faulthandler` of Python.
"""

import faulthandler
import signal
from typing import Final

SIGNAL: Final = signal.SIGUSR2
"""``SIGUSR1`` makes vCPUs leave the guest: see :mod:`postcopy.machine.signals`."""

_STDERR: Final = 2


def tell_when_asked() -> None:
    """Be ready for it; from any thread."""
    faulthandler.register(SIGNAL, file=_STDERR)
