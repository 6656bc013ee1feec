"""The two signals that a machine lives with, and the one place that arranges for them.

``SIGUSR1`` is the kick: it makes ``KVM_RUN`` return.  ``SIGBUS`` is what the kernel sends to a vCPU
that touches a poisoned page.  Neither handler does anything: that there is one, in Python, keeps
the signal from ending the process and lets the kernel call it interrupts come back.

A Python handler for ``SIGBUS`` does not help a plain thread that touches such a page: the access is
tried again, for ever.  Guest memory that may be poisoned is read by vCPUs and engines, not by us.
"""

import signal
import threading

from postcopy.errors import WrongState

KICK = signal.SIGUSR1


def _ignore(_number: int, _frame: object) -> None:
    """Nothing to do: the signal has done its work by arriving."""


def install_kick_handler() -> None:
    """Make ``SIGUSR1`` and ``SIGBUS`` harmless.  Call it in the main thread, before any machine.

    Harmless when done already.  Machines made in the main thread call it themselves.

    :raises WrongState: this is another thread, where Python installs no handlers, and the main
        thread has not called it.
    """
    if signal.getsignal(KICK) is _ignore and signal.getsignal(signal.SIGBUS) is _ignore:
        return
    if threading.current_thread() is not threading.main_thread():
        raise WrongState(
            "signals can only be arranged for in the main thread; "
            "call postcopy.machine.signals.install_kick_handler() there first"
        )
    signal.signal(KICK, _ignore)
    signal.signal(signal.SIGBUS, _ignore)
