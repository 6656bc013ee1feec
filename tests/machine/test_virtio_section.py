"""The section of a drive: there and back, what is written when, and what cannot be taken."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import GuestError, PostcopyError, StreamError
from postcopy.machine.device_formats import FORMATS
from postcopy.machine.virtio_section import FORMATS as VIRTIO_FORMATS
from postcopy.machine.virtio_section import NAME, VIRTIO_BLK, state_of, values_of
from postcopy.machine.virtio_state import VIRTIO_NET, QueueRegisters, RingState, VirtioState
from postcopy.stream.description import described_bytes

CONFIG = bytes(range(57))
RUNNING = VirtioState(
    CONFIG,
    status=15,
    interrupt=1,
    written_features=1 << 32 | 1 << 9,
    features=1 << 32 | 1 << 9,
    queues=(QueueRegisters(8, True, 0x200000, 0x200080, 0x1_0020_1000),),
    rings=(RingState(8, 0x200000, 0x200080, 0x1_0020_1000, 65535),),
)
QUEUE_AT = 24 + len(CONFIG)
FLAG_AT = QUEUE_AT + 4 + 18


def encoded(state):
    return VIRTIO_BLK.encode(values_of(state))


def decoded(payload):
    return state_of(FORMATS.decode(NAME, 0, 2, payload))


words, bits = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
states = st.builds(
    VirtioState,
    config=st.binary(max_size=80),
    device_features_select=words,
    driver_features_select=words,
    queue_select=st.integers(0, 65535),
    status=st.integers(0, 255),
    interrupt=st.integers(0, 3),
    written_features=bits,
    features=st.integers(1 << 32, 2**64 - 1),
    queues=st.tuples(
        st.builds(QueueRegisters, st.integers(0, 65535), st.booleans(), bits, bits, bits)
    ),
    rings=st.tuples(st.builds(RingState, words, bits, bits, bits, st.integers(0, 65535))),
    broken=st.booleans(),
)


@given(states)
def test_there_and_back(state):
    assert decoded(encoded(state)) == state


def test_it_is_as_long_as_qemus():
    """48387 bytes: measured on QEMU 10.0 with one queue of 8 entries in use, and 57 of configuration."""
    assert len(encoded(RUNNING)) == 48387
    head = struct.unpack_from(">IIIBBHII", encoded(RUNNING))
    assert head == (0, 0, 0, 15, 1, 0, 1 << 9, 57)
    assert encoded(RUNNING)[24:QUEUE_AT] == CONFIG
    queue = struct.unpack_from(">IIIQHB", encoded(RUNNING), QUEUE_AT)
    assert queue == (1, 8, 4096, 0x200000, 65535, 0)


@pytest.mark.parametrize(
    ("state", "name", "sent"),
    [
        (RUNNING, b"virtio/started", True),
        (replace(RUNNING, status=11), b"virtio/started", False),
        (RUNNING, b"virtio/broken", False),
        (replace(RUNNING, broken=True), b"virtio/broken", True),
        (RUNNING, b"virtio/ringsize", True),
        (VirtioState(CONFIG), b"virtio/ringsize", False),
    ],
)
def test_a_subsection_is_sent_when_it_says_something(state, name, sent):
    assert (name in encoded(state)) is sent


def test_its_length_is_told_as_soon_as_it_can_be():
    payload = encoded(RUNNING)
    behind = payload + b"\x7e\0\0\0\5"
    assert FORMATS.payload_length(NAME, 0, 2, memoryview(behind)) == len(payload)
    for end in (0, 23, 24, QUEUE_AT, FLAG_AT, FLAG_AT + 1, FLAG_AT + 3, len(payload)):
        assert FORMATS.payload_length(NAME, 0, 2, memoryview(behind)[:end]) is None


def test_the_description_has_it_as_one_field():
    payload = encoded(RUNNING)
    described = VIRTIO_BLK.describe(values_of(RUNNING))
    assert described["fields"] == [{"name": "virtio", "type": "virtio", "size": len(payload)}]
    assert described_bytes(described) == len(payload)


def changed(at, data):
    payload = bytearray(encoded(RUNNING))
    payload[at : at + len(data)] = data
    return bytes(payload)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (changed(20, b"\xff\xff\xff\xff"), "a configuration space of 4294967295 bytes is too long"),
        (changed(QUEUE_AT, b"\0\0\0\2"), "it has 2 queues, ours has 1; give it num-queues=1"),
        (changed(FLAG_AT, b"\1"), "it has requests in flight"),
        (changed(FLAG_AT + 3, b"virtio/65"), "unknown subsection 'virtio/65"),
        (encoded(RUNNING)[:-1], "bytes are too few"),
        (encoded(RUNNING) + b"\0", "are more than its format has"),
        (encoded(RUNNING)[:10], "10 bytes are too few"),
    ],
)
def test_what_cannot_be_is_refused(payload, why):
    with pytest.raises(StreamError, match=why):
        decoded(payload)


def test_another_version():
    with pytest.raises(StreamError, match="unsupported version 3 for 'virtio-mmio@0"):
        FORMATS.decode(NAME, 0, 3, encoded(RUNNING))
    with pytest.raises(StreamError, match="version_id 1 is too old"):
        FORMATS.decode(NAME, 0, 1, encoded(RUNNING))


def test_a_legacy_transport_is_refused():
    values = values_of(RUNNING)
    del values["virtio/extra_state"]
    with pytest.raises(GuestError, match="force-legacy=off"):
        decoded(VIRTIO_BLK.encode(values))


@given(st.integers(0, 700), st.binary(min_size=1, max_size=8))
def test_damaged_bytes_are_read_or_refused_and_nothing_else(at, data):
    try:
        decoded(changed(at, data))
    except PostcopyError:
        pass


NET = VIRTIO_FORMATS[VIRTIO_NET]
ADDRESS = bytes.fromhex("525400123456")
NETWORK = VirtioState(
    ADDRESS,
    status=15,
    written_features=1 << 32,
    features=1 << 32,
    queues=(
        QueueRegisters(8, True, 1 << 21, 1 << 22, 1 << 23),
        QueueRegisters(8, True, 16, 32, 64),
    ),
    rings=(RingState(8, 1 << 21, 1 << 22, 1 << 23, 7), RingState(8, 16, 32, 64, 65535)),
    section=VIRTIO_NET,
)
NET_QUEUES_AT = 24 + len(ADDRESS)
NET_FIELDS_AT = NET_QUEUES_AT + 4 + 3 * 18


def network(payload):
    return state_of(FORMATS.decode(NET.name, 0, 11, bytes(payload)), VIRTIO_NET)


@pytest.mark.parametrize(
    "state",
    [
        NETWORK,
        VirtioState(
            ADDRESS, queues=2 * (QueueRegisters(),), rings=2 * (RingState(),), section=VIRTIO_NET
        ),
    ],
)
def test_a_network_there_and_back(state):
    assert network(NET.encode(values_of(state))) == state


def test_a_network_is_as_long_as_qemus():
    """44780 bytes: QEMU 10.0, three queues (one of control) never used, and 8 of configuration."""
    unused = VirtioState(
        ADDRESS, queues=2 * (QueueRegisters(),), rings=2 * (RingState(),), section=VIRTIO_NET
    )
    payload = NET.encode(values_of(unused))
    assert len(payload) == 44780 - 8 + len(ADDRESS)
    assert payload[NET_FIELDS_AT:][:18] == ADDRESS + bytes(8) + b"\0\1\1\0"
    assert payload[NET_FIELDS_AT + 18 :][: 4 + 512] == bytes(4) + b"\xff" * 512


def test_a_network_whose_control_queue_is_used_is_refused():
    payload = bytearray(NET.encode(values_of(NETWORK)))
    payload[NET_QUEUES_AT + 4 + 2 * 18 + 8] = 1
    with pytest.raises(GuestError, match="has a control queue, ours has none; give it ctrl_vq=off"):
        network(payload)
    payload = bytearray(NET.encode(values_of(NETWORK)))
    payload[NET_FIELDS_AT + 21] = 1
    with pytest.raises(StreamError, match="filled the table of addresses; give it ctrl_vq=off"):
        network(payload)
    payload = bytearray(NET.encode(values_of(NETWORK)))
    payload[NET_QUEUES_AT + 3] = 5
    with pytest.raises(StreamError, match="it has 5 queues, ours has 3; give it queues=1"):
        network(payload)
