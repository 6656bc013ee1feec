"""How two of us recognise each other, on a stream that is QEMU's to the last byte.

A source of ours sends one more ping than QEMU would, with a number that QEMU returns as it does every
number.  A destination of ours returns it with all bits turned.  What only we understand (the section
of our serial port) is sent only to a destination that has answered so.
"""

IDENTITY_PING = 0x706F7374
"""ASCII ``post``."""

ALL_SENT_PING = 0x73656E74
"""ASCII ``sent``: every page is on its way.  One of us answers when none is missing any more."""


def answer(value: int) -> int:
    """What one of us answers to a ping."""
    return value ^ 0xFFFFFFFF if value in {IDENTITY_PING, ALL_SENT_PING} else value


def needs_nothing(pong: int) -> bool:
    """Tell whether only one of us, with its last page in place, would have answered so."""
    return pong == ALL_SENT_PING ^ 0xFFFFFFFF


def is_ours(pong: int) -> bool:
    """Tell whether only one of us would have answered so."""
    return pong == IDENTITY_PING ^ 0xFFFFFFFF
