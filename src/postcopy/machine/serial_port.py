"""A 16550 serial port that only speaks: what the guest writes goes to a callback, at once.

The transmitter is always empty, so a guest that polls the line status never waits; nothing is ever
received and no interrupt is ever raised.  The registers are state and move with the machine.
(National Semiconductor PC16550D data sheet, table of registers.)
"""

from collections.abc import Callable
from dataclasses import replace

from postcopy.machine.serial_state import SerialState

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
    """The port's eight registers.  Its user keeps calls apart (see ``PortBus``).

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
