"""What of a 16550 serial port moves with the machine: its registers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SerialState:
    """The registers of the port, by QEMU's names for them; the defaults are those after reset.

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
