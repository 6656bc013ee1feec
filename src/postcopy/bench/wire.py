r"""The protocol between the two ends of a measurement; all numbers are big-endian.

Each connection begins with a greeting of 32 bytes in both directions, and then has messages::

    magic "PCBENCH\n" │ version u16 │ channel u16 │ reserved u32 │ session 16 bytes
    kind u8 │ reserved u8 │ reserved u16 │ length u32 │ value u64 │ body, length bytes

=========  ========  ==================================================================
PING       measurer  answered at once by PONG with the same value
PAGES      measurer  records of pages, as a migration sends them; value 1: received in place
MARK       measurer  answered by MARKED with the same value: bytes received so far, and the time in ns
END        measurer  the connection has done its work
WELCOME    listener  follows its greeting: the connection is taken
REFUSED    listener  it is not, and a text says why
=========  ========  ==================================================================

Nothing else begins like the greeting, and it begins like nothing else: a migration is told from it by its
first word, at either end.
"""

import enum
import struct
from dataclasses import dataclass
from typing import Final, NoReturn

from postcopy.channel.channel import Channel
from postcopy.errors import ChannelBroken, StreamCut, StreamError, on_one_line
from postcopy.multifd.group import MAGIC_BYTES
from postcopy.stream import multifd_header, numbers

MAGIC: Final = b"PCBENCH\n"
VERSION: Final = 1
SESSION_BYTES: Final = 16
MOST_MULTIFD: Final = 16
MOST_CHANNELS: Final = MOST_MULTIFD + 3
"""Of one measurement: the one that is pinged, those of two loads, and those of multifd."""

MOST_PAGES_BYTES: Final = 2 << 20
MOST_TEXT_BYTES: Final = 400
SILENT_MS: Final = 4000
"""How long a peer may do nothing: with the time to notice it, less than 5 s."""

_GREETING: Final = struct.Struct(f">8sHHI{SESSION_BYTES}s")
_HEAD: Final = struct.Struct(">BBHIQ")
_MARKED: Final = struct.Struct(">QQ")


class Kind(enum.IntEnum):
    """What a message is."""

    PING = 1
    PONG = 2
    PAGES = 3
    MARK = 4
    MARKED = 5
    END = 6
    WELCOME = 7
    REFUSED = 8


_LENGTHS: Final = {
    Kind.PING: (0, 0),
    Kind.PONG: (0, 0),
    Kind.PAGES: (1, MOST_PAGES_BYTES),
    Kind.MARK: (0, 0),
    Kind.MARKED: (_MARKED.size, _MARKED.size),
    Kind.END: (0, 0),
    Kind.WELCOME: (0, 0),
    Kind.REFUSED: (1, MOST_TEXT_BYTES),
}
FROM_MEASURER: Final = frozenset({Kind.PING, Kind.PAGES, Kind.MARK, Kind.END})
FROM_LISTENER: Final = frozenset({Kind.PONG, Kind.MARKED, Kind.WELCOME, Kind.REFUSED})

COPIED, IN_PLACE = 0, 1
"""The value of PAGES."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a connection begins with.

    :ivar channel: its number in the session, from 0 on.
    :ivar session: all connections of a measurement have the same.
    """

    channel: int
    session: bytes

    def encode(self) -> bytes:
        """As it stands on the wire."""
        return _GREETING.pack(MAGIC, VERSION, self.channel, 0, self.session)


@dataclass(frozen=True, slots=True)
class Message:
    """A message; the body is still to be received."""

    kind: Kind
    value: int
    length: int


def encode(kind: Kind, value: int = 0, body_bytes: int = 0) -> bytes:
    """Write what leads a message; the body follows it."""
    return _HEAD.pack(kind, 0, 0, body_bytes, value)


def encode_marked(value: int, received_bytes: int, now_ns: int) -> bytes:
    """Write the answer to a MARK."""
    return encode(Kind.MARKED, value, _MARKED.size) + _MARKED.pack(received_bytes, now_ns)


def encode_refusal(text: str) -> bytes:
    """Write why a connection is refused."""
    body = text.encode()[:MOST_TEXT_BYTES]
    return encode(Kind.REFUSED, 0, len(body)) + body


class Wire:
    """Receives what stands on one connection, and knows how far it has come.  One thread receives.

    :param wanted: the messages that this end takes.
    """

    def __init__(self, channel: Channel, wanted: frozenset[Kind]) -> None:
        self.channel = channel
        self._wanted = wanted
        self._at = 0  # bytes received, and done with

    def greeting(self) -> Greeting:
        """Receive the greeting.

        :raises StreamError: the peer is something else, which the text names.
        :raises ChannelBroken: it has closed the connection.
        """
        begun = self._receive(len(MAGIC), may_be_short=True)
        if begun != MAGIC:
            self._fail(_stranger(begun), 0)
        raw = begun + self._receive(_GREETING.size - len(MAGIC))
        _, version, channel, reserved, session = _GREETING.unpack(raw)
        if version != VERSION:
            self._fail(
                f"it speaks version {version} of 'postcopy bench', and this side {VERSION}", 8
            )
        if channel >= MOST_CHANNELS:
            self._fail(f"channel {channel}; at most {MOST_CHANNELS} are taken", 10)
        if reserved:
            self._fail(f"reserved field of the greeting is {reserved:#x}", 12)
        self._at += _GREETING.size
        return Greeting(channel, session)

    def welcome(self, ours: Greeting) -> None:
        """Receive the answer to a greeting of this side.

        :raises StreamError: the peer refuses it, or is something else.
        """
        try:
            answer = self.greeting()
        except ChannelBroken as error:  # it is closed, or reset
            raise ChannelBroken(
                f"{error}: no 'postcopy bench' answers there; the destination of a migration ends so"
            ) from error
        if answer != ours:
            self._fail("the peer answers to another measurement", 10 - _GREETING.size)
        if self.message().kind is not Kind.WELCOME:
            self._fail("the peer does not say whether it takes the connection", -_HEAD.size)

    def message(self) -> Message:
        """Receive what leads the next message.

        :raises StreamError: it is none that this end takes; or a refusal, whose text it has.
        :raises StreamCut: the connection ends.
        """
        kind, reserved, more_reserved, length, value = _HEAD.unpack(self._receive(_HEAD.size))
        if reserved or more_reserved:
            self._fail(f"reserved field of a message is {reserved << 16 | more_reserved:#x}", 1)
        if kind not in self._wanted:
            self._fail(f"unknown message {kind}", 0)
        least, most = _LENGTHS[Kind(kind)]
        if not least <= length <= most:
            self._fail(f"{length} bytes in {Kind(kind).name}; {least} to {most} are taken", 4)
        self._at += _HEAD.size
        if kind == Kind.REFUSED:
            text = self._receive(length).decode(errors="replace")
            self._fail(f"the peer refuses: {text}", -_HEAD.size)
        return Message(Kind(kind), value, length)

    def body_into(self, view: memoryview) -> None:
        """Receive the body of a message, whose length the view has."""
        if self.channel.receive_all(view) < len(view):
            self._cut()
        self._at += len(view)

    def marked(self, message: Message) -> tuple[int, int]:
        """Receive the body of MARKED: bytes received, and nanoseconds."""
        raw = bytearray(message.length)
        self.body_into(memoryview(raw))
        received_bytes, now_ns = _MARKED.unpack(raw)
        return int(received_bytes), int(now_ns)

    def _receive(self, count: int, *, may_be_short: bool = False) -> bytes:
        raw, done = memoryview(bytearray(count)), 0
        while done < count:
            got = self.channel.receive_into(raw[done:])
            if not got and may_be_short and done:
                break
            if not got:
                self._cut()
            done += got
        return bytes(raw[:done])

    def _cut(self) -> NoReturn:
        if not self.channel.received_bytes:
            raise ChannelBroken(f"{self.channel.description}: the peer closed the connection")
        raise StreamCut(f"{self.channel.description}: the measurement was cut", self._at)

    def refuse(self, text: str) -> NoReturn:
        """Refuse the value of the message that has just been received."""
        self._fail(text, -8)

    def _fail(self, text: str, at: int) -> NoReturn:
        raise StreamError(f"{self.channel.description}: {text}", self._at + at)


_TLS: Final = (numbers.TLS_HANDSHAKE, numbers.TLS_ALERT)


def _stranger(begun: bytes) -> str:
    """Say what a peer is that begins like this."""
    word = int.from_bytes(begun[:MAGIC_BYTES], "big")
    if word >> 16 in _TLS:
        return "the peer speaks TLS; give --tls DIR here too, or leave it out there"
    if word == numbers.MAGIC:
        return (
            "the peer sends a migration stream; a destination takes it ('postcopy run --incoming'), and "
            "here 'postcopy bench' measures"
        )
    if word == multifd_header.MAGIC:
        return "the peer sends a channel of multifd, and here 'postcopy bench' measures"
    if begun.startswith(b'{"QMP"'):
        return "there is a QMP monitor; give the address of 'postcopy bench --listen'"
    shown = on_one_line(begun.decode("latin-1"))
    return f"the peer is no 'postcopy bench': it begins with '{shown}'"
