"""Keep idle CPUs out of idle states while threads wait for pages.

A page that comes over the network wakes four threads, one after the other.  An idle CPU enters an idle
state, and to leave it takes tens of microseconds: on a virtual machine, more than all the rest of the
work.  A PM QoS request bounds that latency; at 0 an idle CPU polls.

It costs power, and the sibling hyper-thread or another guest on the CPU may get slower.  So the request is
held only while pages are requested, and a little longer.  The kernel drops it when its process dies.

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
    """Holds a PM QoS request for zero CPU latency, as long as :meth:`a_while` is called now and then.

    Nothing here raises: a process without the permission goes on without, and does not try again.
    """

    def __init__(self, device: Path = DEVICE) -> None:
        self._device = device
        self._until_ns = 0
        self._closing = threading.Event()
        # Invariant, under the lock: while `_settled` is false, no request is held; it is true while there
        # is one, after a refusal, and for good once this is closed.
        self._lock = threading.Lock()
        self._settled = False
        self._ender: threading.Thread | None = None

    def a_while(self) -> None:
        """Hold the request for the next tenth of a second; any thread may call this, and often."""
        self._until_ns = time.monotonic_ns() + _WHILE_NS
        # First the time, then this check: the thread that ends the request does it the other way round.
        if not self._settled:
            with self._lock:
                if not self._settled:
                    self._settled = True
                    self._ask()

    def close(self) -> None:
        """Drop the request, for good; any thread may call this, and more than once."""
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
                # A later call of `a_while` makes a new request; an earlier one has set the time.
                closing = self._settled = self._closing.is_set()
                held = not closing and self._until_ns > time.monotonic_ns()
                if held:
                    self._settled = True
                else:
                    os.close(request)  # which ends it
