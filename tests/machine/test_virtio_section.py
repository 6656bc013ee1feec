"""The section of a drive: there and back, what is written when, and what cannot be taken."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import GuestError, PostcopyError, StreamError
from postcopy.machine.device_formats import FORMATS
from postcopy.machine.virtio_section import NAME, VIRTIO_BLK, state_of, values_of
from postcopy.machine.virtio_state import QueueRegisters, RingState, VirtioState
from postcopy.stream.description import described_bytes

CONFIG = bytes(range(57))
RUNNING = VirtioState(
    CONFIG,
    status=15,
    interrupt=1,
    written_features=1 << 32 | 1 << 9,
    features=1 << 32 | 1 << 9,
    queue=QueueRegisters(8, True, 0x200000, 0x200080, 0x1_0020_1000),
    ring=RingState(8, 0x200000, 0x200080, 0x1_0020_1000, 65535),
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
    queue=st.builds(QueueRegisters, st.integers(0, 65535), st.booleans(), bits, bits, bits),
    ring=st.builds(RingState, words, bits, bits, bits, st.integers(0, 65535)),
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
