"""The machine's I/O ports: a serial port at 0x3f8, and 0xf4 to switch the machine off."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class SerialState:
    """The registers, which move with the machine, by QEMU's names; the defaults are those after reset.

    ``rbr`` is the received byte, ``fcr`` the FIFO control; ``divider`` is the baud rate's.
    """

    divider: int = 12
    rbr: int = 0
    ier: int = 0
    iir: int = 1
    lcr: int = 0
    mcr: int = 8
    lsr: int = 0x60
    msr: int = 0xB0
    scr: int = 0
    fcr: int = 0


DATA, INTERRUPT_ENABLE, FIFO_CONTROL, LINE_CONTROL = 0, 1, 2, 3
MODEM_CONTROL, LINE_STATUS, MODEM_STATUS, SCRATCH = 4, 5, 6, 7
TRANSMITTER_EMPTY = 0x60
DIVISOR_LATCH = 0x80

_PLAIN = {LINE_CONTROL: "lcr", MODEM_CONTROL: "mcr", SCRATCH: "scr"}
_READABLE = _PLAIN | {
    DATA: "rbr",
    INTERRUPT_ENABLE: "ier",
    FIFO_CONTROL: "iir",
    MODEM_STATUS: "msr",
}


class SerialPort:
    """The eight registers of a 16550 that only sends (National Semiconductor PC16550D data sheet).

    The transmitter is always empty, so a guest that polls the line status never waits.  Nothing is ever
    received, and no interrupt is raised.  Calls must not overlap: :class:`PortBus` has the lock.

    :param on_output: gets each byte that the guest sends, on the vCPU's thread.
    """

    def __init__(self, on_output: Callable[[bytes], None]) -> None:
        self.state = SerialState()
        self._on_output = on_output

    def read(self, register: int) -> int:
        """What the guest finds in register 0 to 7."""
        state = self.state
        if register == LINE_STATUS:
            return TRANSMITTER_EMPTY
        if register in {DATA, INTERRUPT_ENABLE} and state.lcr & DIVISOR_LATCH:
            return state.divider >> (8 * register) & 0xFF
        value: int = getattr(state, _READABLE[register])
        return value

    def write(self, register: int, value: int) -> None:
        """Take the guest's write; status registers ignore it, as the chip does."""
        state = self.state
        if register in {DATA, INTERRUPT_ENABLE} and state.lcr & DIVISOR_LATCH:
            shift = 8 * register
            self.state = replace(state, divider=state.divider & ~(0xFF << shift) | value << shift)
        elif register == DATA:
            self._on_output(bytes([value]))
        elif register == INTERRUPT_ENABLE:
            self.state = replace(state, ier=value & 0x0F)
        elif register == FIFO_CONTROL:
            # Bits 1 and 2 clear the FIFOs and do not stay; bit 0 shows in IIR as "16550 with FIFO".
            self.state = replace(state, fcr=value & 0xC9, iir=0xC1 if value & 1 else 0x01)
        elif register in _PLAIN:
            self.state = replace(state, **{_PLAIN[register]: value})


SERIAL_BASE = 0x3F8
EXIT_PORT = 0xF4


class PortBus:
    """What IN and OUT reach.  The vCPUs' threads may call it at once: it has a lock.

    :param on_exit: the guest has written a value to the exit port.  Called on the vCPU's thread,
        which must not wait there for any vCPU to stop.
    """

    def __init__(self, serial: SerialPort, on_exit: Callable[[int], None]) -> None:
        self._serial = serial
        self._on_exit = on_exit
        self._lock = threading.Lock()

    def read(self, port: int, size_bytes: int) -> int:
        """What IN reads; all ones where no device is."""
        with self._lock:
            if size_bytes == 1 and port - SERIAL_BASE in range(8):
                return self._serial.read(port - SERIAL_BASE)
        return (1 << 8 * size_bytes) - 1

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """What OUT writes; without effect where no device is."""
        with self._lock:
            if size_bytes == 1 and port - SERIAL_BASE in range(8):
                self._serial.write(port - SERIAL_BASE, value)
                return
        if port == EXIT_PORT:
            self._on_exit(value)
