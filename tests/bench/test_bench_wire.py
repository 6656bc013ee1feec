"""The protocol of a measurement: what is strange or hostile is refused by name and place."""

import socket
import struct

import pytest

from postcopy.bench import wire
from postcopy.bench.wire import FROM_LISTENER, FROM_MEASURER, Greeting, Kind, Wire
from postcopy.channel.sockets import SocketChannel
from postcopy.errors import ChannelBroken, StreamCut, StreamError
from postcopy.parameters import Capabilities
from postcopy.stream import multifd_encoder
from postcopy.stream.encoder import configuration, stream_start

GREETING = Greeting(3, b"s" * wire.SESSION_BYTES)
HEAD = struct.Struct(">BBHIQ")


def receiving(raw, wanted=FROM_MEASURER, *, ended=True):
    """What receives these bytes."""
    ours, theirs = socket.socketpair()
    theirs.sendall(raw)
    if ended:
        theirs.close()
    return Wire(SocketChannel(ours, "peer"), wanted)


def test_a_greeting_arrives_as_it_was():
    with (found := receiving(GREETING.encode())).channel:
        assert found.greeting() == GREETING


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (stream_start(configuration("microvm", Capabilities())), "sends a migration stream"),
        (multifd_encoder.encode_initial(0), "a channel of multifd"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "speaks TLS; give --tls DIR here too"),
        (b"\x15\x03\x03\x00\x02\x02\x46", "speaks TLS; give --tls DIR here too"),  # an alert, whole
        (b'{"QMP": {"version": {}}}', "a QMP monitor"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "it begins with 'SSH-2.0-'"),
        (b"\x1b]0;\x07GET /", "it begins with '\\x1b]0;\\x07GET'"),
        (b"Q", "it begins with 'Q'"),
    ],
)
def test_a_stranger_is_named(raw, text):
    with (found := receiving(raw)).channel:
        with pytest.raises(StreamError) as caught:
            found.greeting()
        assert text in str(caught.value)
        assert caught.value.offset == 0


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (8, b"\x00\x02", "speaks version 2"),
        (10, b"\xff\xff", "channel 65535"),
        (12, b"\x00\x00\x00\x01", "reserved field of the greeting"),
    ],
)
def test_a_greeting_of_another_kind_is_refused(at, value, text):
    raw = bytearray(GREETING.encode())
    raw[at : at + len(value)] = value
    with (found := receiving(bytes(raw))).channel:
        with pytest.raises(StreamError, match=text) as caught:
            found.greeting()
        assert caught.value.offset == at


@pytest.mark.parametrize(
    ("raw", "wanted", "text", "at"),
    [
        (HEAD.pack(0, 0, 0, 0, 0), FROM_MEASURER, "unknown message 0", 0),
        (HEAD.pack(Kind.PONG, 0, 0, 0, 0), FROM_MEASURER, "unknown message 2", 0),
        (HEAD.pack(Kind.PING, 0, 0, 0, 0), FROM_LISTENER, "unknown message 1", 0),
        (HEAD.pack(Kind.PING, 1, 0, 0, 0), FROM_MEASURER, "reserved field of a message", 1),
        (HEAD.pack(Kind.PING, 0, 1, 0, 0), FROM_MEASURER, "reserved field of a message", 1),
        (HEAD.pack(Kind.PING, 0, 0, 1, 0), FROM_MEASURER, "1 bytes in PING", 4),
        (HEAD.pack(Kind.PAGES, 0, 0, 0, 0), FROM_MEASURER, "0 bytes in PAGES", 4),
        (HEAD.pack(Kind.PAGES, 0, 0, 0xFFFFFFFF, 0), FROM_MEASURER, "4294967295 bytes in PAGES", 4),
        (HEAD.pack(Kind.MARKED, 0, 0, 8, 0), FROM_LISTENER, "8 bytes in MARKED", 4),
        (HEAD.pack(Kind.REFUSED, 0, 0, 1 << 20, 0), FROM_LISTENER, "1048576 bytes in REFUSED", 4),
    ],
)  # fmt: skip
def test_a_hostile_message_is_refused_by_name_and_place(raw, wanted, text, at):
    before = GREETING.encode()
    with (found := receiving(before + raw, wanted)).channel:
        found.greeting()
        with pytest.raises(StreamError, match=text) as caught:
            found.message()
        assert caught.value.offset == len(before) + at


def test_places_count_bodies():
    raw = wire.encode(Kind.PAGES, 0, 100) + bytes(100) + HEAD.pack(9, 0, 0, 0, 0)
    with (found := receiving(raw)).channel:
        assert found.message().length == 100
        found.body_into(memoryview(bytearray(100)))
        with pytest.raises(StreamError) as caught:
            found.message()
        assert caught.value.offset == HEAD.size + 100


@pytest.mark.parametrize("length", range(1, HEAD.size + 8))
def test_a_cut_is_told_wherever_it_is(length):
    raw = (wire.encode(Kind.PAGES, 0, 8) + bytes(8))[:length]
    with (found := receiving(GREETING.encode() + raw)).channel:
        found.greeting()
        with pytest.raises(StreamCut, match="was cut"):
            found.body_into(memoryview(bytearray(found.message().length)))


def test_a_cut_greeting_is_told():
    with (found := receiving(GREETING.encode()[:20])).channel:
        with pytest.raises(StreamCut) as caught:
            found.greeting()
        assert caught.value.offset == 0


def test_a_refusal_has_the_words_of_the_peer_on_one_line():
    raw = GREETING.encode() + wire.encode_refusal("no\nroom" + "é" * 400)
    with (found := receiving(raw, FROM_LISTENER)).channel:
        with pytest.raises(StreamError, match=r"the peer refuses: no\\nroom") as caught:
            found.welcome(GREETING)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "error", "text"),
    [
        (b"", ChannelBroken, "no 'postcopy bench' answers there"),
        (Greeting(3, b"o" * 16).encode(), StreamError, "answers to another measurement"),
        (GREETING.encode() + wire.encode(Kind.PONG), StreamError, "does not say whether it takes"),
    ],
)
def test_a_greeting_is_answered_or_else(raw, error, text):
    with (found := receiving(raw, FROM_LISTENER)).channel, pytest.raises(error, match=text):
        found.welcome(GREETING)
