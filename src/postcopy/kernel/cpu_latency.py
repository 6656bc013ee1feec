"""Keep idle CPUs awake while a thread waits for one that sleeps.

A page that comes over the network wakes four threads, one after the other.  A CPU that has nothing to
do goes to sleep, and it takes tens of microseconds to wake one: on a virtual machine, more than all the
rest of the work.  PM QoS says how long that may take; at 0 an idle CPU waits without sleeping.

It costs power, and at times a sibling's or a neighbour's speed.  So it is asked for only while pages
are asked for, and a little longer.  The kernel ends what a process that dies has asked for.

Source: the kernel's ``Documentation/power/pm_qos_interface.rst``.
"""

import os
import struct
import threading
import time
from pathlib import Path
from typing import Final

DEVICE: Final = Path("/dev/cpu_dma_latency")

_NO_LATENCY: Final = struct.pack("=i", 0)  # microseconds
_WHILE_NS: Final = 100_000_000
_LOOK_S: Final = 0.05


class CpusAwake:
    """Asks for CPUs that are awake, while :meth:`a_while` is called now and then.

    Nothing here raises: a process that may not ask goes without, and does not try again.
    """

    def __init__(self, device: Path = DEVICE) -> None:
        self._device = device
        self._until_ns = 0
        self._closing = threading.Event()
        # Invariant, under the lock: while nothing is settled, no request is held; it is settled
        # when there is one, when it was refused, and for good when this is closed.
        self._lock = threading.Lock()
        self._settled = False
        self._ender: threading.Thread | None = None

    def a_while(self) -> None:
        """Keep CPUs awake for the next tenth of a second; any thread may call this, and often."""
        self._until_ns = time.monotonic_ns() + _WHILE_NS
        # First the time, then this look: the ender does it the other way round.
        if not self._settled:
            with self._lock:
                if not self._settled:
                    self._settled = True
                    self._ask()

    def close(self) -> None:
        """Let them sleep, now and for good; any thread may call this, and more than once."""
        with self._lock:
            self._settled = True
            self._closing.set()
            ender = self._ender
        if ender is not None:
            ender.join()

    def _ask(self) -> None:
        try:
            request = os.open(self._device, os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            return
        ender = threading.Thread(target=self._end, args=(request,), name="cpus-awake", daemon=True)
        try:
            os.write(request, _NO_LATENCY)
            ender.start()
        except (OSError, RuntimeError):  # refused, or there can be no more threads
            os.close(request)
        else:
            self._ender = ender

    def _end(self, request: int) -> None:
        held = True
        while held:
            self._closing.wait(_LOOK_S)
            with self._lock:
                # A call from here on asks anew; one before has said until when.
                closing = self._settled = self._closing.is_set()
                held = not closing and self._until_ns > time.monotonic_ns()
                if held:
                    self._settled = True
                else:
                    os.close(request)  # which ends it
