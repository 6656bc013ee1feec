"""The numbers of all pings, and how two machines of ours recognise each other by them.

A destination of QEMU's answers each ping with its number, and gives the number no meaning.  So a source
may send any ping at any point of the stream, and the answer says that all before it has been read.

A source of ours sends one more ping than QEMU would, :data:`IDENTITY_PING`.  A destination of ours answers
with all bits turned.  What only we understand (the section of our serial port) is sent to no other
destination.
"""

HEADER_PING = 1
"""Behind the header; the numbers 1 to 4 are QEMU's own."""

BEFORE_PACKAGE_PING = 2
PACKAGE_PING = 3
"""In the package, behind the devices: the answer says that they are loaded."""
AFTER_PACKAGE_PING = 4

BEFORE_END_PING = 5
"""Precopy's, before the last byte; see decision 0005."""

PREEMPT_CHECK_PINGS = (6, 7)
"""Behind the opening of the preempt channel: the destination closes one that it does not want before it
answers the second."""

PREEMPT_PROBE_PING = 8
"""Unanswered by a destination that reads nothing before the preempt channel is there (QEMU 7.1 and 7.2)."""

KEEPALIVE_PING = 9
"""Sent while there is nothing else to send: a silent destination is taken to be gone."""

DISCARD_PINGS = (10, 11, 12)
"""One behind each pass of discards before the guest stops."""

FIRST_WINDOW_PING, WINDOW_PINGS = 0x10000, 0x10000
"""First and count of those behind batches of the push, in turn; see decision 0004."""

IDENTITY_PING = 0x706F7374
"""ASCII ``post``."""

ALL_SENT_PING = 0x73656E74
"""ASCII ``sent``: every page has been sent.  A destination of ours answers when no page is missing."""


def answer(value: int) -> int:
    """What a destination of ours answers to a ping."""
    return value ^ 0xFFFFFFFF if value in {IDENTITY_PING, ALL_SENT_PING} else value


def needs_nothing(pong: int) -> bool:
    """Whether the answer is that of a destination of ours that misses no page."""
    return pong == ALL_SENT_PING ^ 0xFFFFFFFF


def is_ours(pong: int) -> bool:
    """Whether the answer is that of a destination of ours."""
    return pong == IDENTITY_PING ^ 0xFFFFFFFF
