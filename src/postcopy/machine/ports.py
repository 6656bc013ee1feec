"""The machine's I/O ports: a serial port at 0x3f8, and 0xf4 to switch the machine off."""

import threading
from collections.abc import Callable

from postcopy.machine.serial_port import SerialPort

SERIAL_BASE = 0x3F8
EXIT_PORT = 0xF4


class PortBus:
    """What IN and OUT reach.  Called by the vCPUs' threads, one at a time under one lock.

    :param on_exit: the guest has written a value to the exit port.  Called on the vCPU's thread,
        which must not wait there for any vCPU to stop.
    """

    def __init__(self, serial: SerialPort, on_exit: Callable[[int], None]) -> None:
        self._serial = serial
        self._on_exit = on_exit
        self._lock = threading.Lock()

    def read(self, port: int, size_bytes: int) -> int:
        """All ones where nothing is."""
        with self._lock:
            if size_bytes == 1 and port - SERIAL_BASE in range(8):
                return self._serial.read(port - SERIAL_BASE)
        return (1 << 8 * size_bytes) - 1

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """Swallowed where nothing is."""
        with self._lock:
            if size_bytes == 1 and port - SERIAL_BASE in range(8):
                self._serial.write(port - SERIAL_BASE, value)
                return
        if port == EXIT_PORT:
            self._on_exit(value)
