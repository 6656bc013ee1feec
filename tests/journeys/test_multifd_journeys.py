"""Precopy over several channels (``multifd``), and what becomes of it in postcopy."""

import pytest

from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK, TRICKLE, hammer
from fakes.waiting import wait_until
from faults.relay import Relay
from postcopy.channel.address import TcpAddress
from postcopy.errors import Refused
from postcopy.parameters import Capability
from postcopy.status import Status

MULTIFD = (Capability.MULTIFD,)
BOTH = (*POSTCOPY, Capability.MULTIFD)
PREEMPT = (*BOTH, Capability.POSTCOPY_PREEMPT)


@pytest.fixture
def relay():
    with Relay("tcp:127.0.0.1:0", "tcp:127.0.0.1:1") as relay:
        yield relay


def begin(trip, relay):
    relay.target = trip.destination.listen()
    trip.source.control.migrate(relay.uri)


def set_channels(trip, source, destination):
    trip.source.set(parameters={"multifd-channels": source})
    trip.destination.set(parameters={"multifd-channels": destination, "x-link-timeout": 500})


def refused_at_both(trip, complaint):
    for side in (trip.source, trip.destination):
        side.until(Status.FAILED)
    assert complaint in trip.destination.error
    trip.verify_source()


@pytest.mark.parametrize(
    ("channels", "compression", "zeros", "way"),
    [
        (1, "none", "multifd", "tcp"),
        (2, "zstd", "multifd", "unix"),
        (4, "zlib", "legacy", "tcp"),
        (16, "none", "none", "tcp"),
    ],
)
def test_moves(journey, tmp_path, channels, compression, zeros, way):
    parameters = QUICK | {"multifd-compression": compression, "zero-page-detection": zeros}
    trip = journey(hammer(vcpus=2), capabilities=MULTIFD, parameters=parameters)
    set_channels(trip, channels, channels)
    trip.migrate("tcp:127.0.0.1:0" if way == "tcp" else f"unix:{tmp_path}/socket")
    trip.finish()
    ram = trip.source.control.info().ram
    assert 0 < ram.multifd_bytes < ram.transferred
    assert ram.transferred == ram.precopy_bytes + ram.downtime_bytes
    if zeros == "none":
        assert ram.duplicate == 0 or ram.multifd_bytes > 4096 * ram.duplicate


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_with_tls_each_connection_has_its_own_handshake(journey, tls_host, compression):
    parameters = QUICK | {"multifd-compression": compression}
    trip = journey(hammer(vcpus=2), capabilities=MULTIFD, parameters=parameters, tls=tls_host)
    set_channels(trip, 4, 4)
    trip.destination.set(parameters={"x-link-timeout": 5000})
    trip.migrate()
    trip.finish()
    assert trip.source.control.info().ram.multifd_bytes > 0


ZERO_COPY = (Capability.MULTIFD, Capability.ZERO_COPY_SEND)
QEMU_SAYS = r"^Zero copy only available for non-compressed non-TLS multifd migration$"


@pytest.mark.parametrize("zeros", ["multifd", "legacy", "none"])
def test_without_a_copy_by_the_kernel(journey, relay, zeros):
    parameters = NEVER_ENDS | {"zero-page-detection": zeros}
    trip = journey(hammer(vcpus=2), capabilities=ZERO_COPY, parameters=parameters)
    begin(trip, relay)
    trip.source.wait_rounds(3)
    trip.source.set(parameters=QUICK)
    trip.finish()
    ram = trip.source.control.info().ram
    # The loopback device takes a copy, whoever wants none: at the end of each round, on each channel.
    assert 0 < ram.dirty_sync_missed_zero_copy <= 2 * ram.dirty_sync_count
    assert 0 < ram.multifd_bytes < ram.transferred


def test_without_a_copy_and_then_by_postcopy(journey):
    trip = journey(hammer(vcpus=2), capabilities=(*BOTH, Capability.ZERO_COPY_SEND))
    trip.source.set(parameters=NEVER_ENDS)
    trip.migrate()
    trip.source.wait_rounds(1)
    trip.source.control.start_postcopy()
    trip.finish()
    assert trip.source.control.info().ram.dirty_sync_missed_zero_copy > 0


def test_no_zero_copy_counts_none(journey):
    trip = journey(hammer(), capabilities=MULTIFD)
    trip.migrate()
    trip.finish()
    assert trip.source.control.info().ram.dirty_sync_missed_zero_copy == 0


@pytest.mark.parametrize("way", ["unix", "file"])
def test_zero_copy_needs_tcp(journey, tmp_path, way):
    more = (Capability.MAPPED_RAM,) if way == "file" else ()
    trip = journey(hammer(), capabilities=(*ZERO_COPY, *more))
    uri = f"{way}:{tmp_path}/there"
    says = f"^zero-copy-send needs tcp:, which {uri} is not; switch it off$"
    with pytest.raises(Refused, match=says):
        trip.source.control.migrate(uri)


@pytest.mark.parametrize("first", [True, False], ids=["capability first", "parameter first"])
def test_zero_copy_goes_with_no_compression(journey, first):
    trip = journey(hammer(), capabilities=MULTIFD)
    steps = [
        lambda: trip.source.set((Capability.ZERO_COPY_SEND,)),
        lambda: trip.source.set(parameters={"multifd-compression": "zstd"}),
    ]
    before, after = steps if first else steps[::-1]
    before()
    with pytest.raises(Refused, match=QEMU_SAYS):
        after()


def test_zero_copy_goes_with_no_tls(journey, tls_host):
    trip = journey(hammer(), capabilities=MULTIFD, tls=tls_host)
    with pytest.raises(Refused, match=QEMU_SAYS):
        trip.source.set((Capability.ZERO_COPY_SEND,))
    trip.source.set(parameters={"tls-creds": ""})
    trip.source.set((Capability.ZERO_COPY_SEND,))
    with pytest.raises(Refused, match=QEMU_SAYS):
        trip.source.set(parameters={"tls-creds": "tls"})


def test_rounds_over_a_guest_that_writes(journey, relay):
    trip = journey(hammer(vcpus=2), capabilities=MULTIFD, parameters=NEVER_ENDS)
    begin(trip, relay)
    trip.source.wait_rounds(4)
    trip.source.set(parameters=QUICK)
    trip.finish()
    assert len(relay.connections) == 3


@pytest.mark.parametrize("capabilities", [BOTH, PREEMPT], ids=["plain", "preempt"])
def test_postcopy_follows_and_recovers_without_them(journey, relay, capabilities):
    trip = journey(hammer(vcpus=2), capabilities=capabilities, parameters=TRICKLE)
    begin(trip, relay)
    wait_until(lambda: trip.source.control.info().ram.multifd_bytes > 1 << 20, 20, "pages")
    sent = trip.source.control.info().ram.multifd_bytes
    trip.source.control.start_postcopy()
    trip.source.wait(Status.POSTCOPY_ACTIVE)
    relay.connections[0].close()
    for side in (trip.source, trip.destination):
        side.until(Status.POSTCOPY_PAUSED)
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    before = len(relay.connections)
    trip.destination.control.recover("tcp:127.0.0.1:0")
    (found,) = trip.destination.control.info().socket_address
    relay.target = str(TcpAddress(found["host"], int(found["port"])))
    trip.source.control.migrate(relay.uri, resume=True)
    trip.finish()
    preempt = Capability.POSTCOPY_PREEMPT in capabilities
    assert before == (4 if preempt else 3)
    assert len(relay.connections) - before == (2 if preempt else 1)
    assert trip.source.control.info().ram.multifd_bytes >= sent


@pytest.mark.parametrize("connection", [0, 2], ids=["main", "multifd"])
def test_a_cut_channel_leaves_the_guest_at_the_source(journey, relay, connection):
    trip = journey(hammer(), capabilities=MULTIFD, parameters=NEVER_ENDS)
    begin(trip, relay)
    trip.source.wait_rounds(2)
    relay.connections[connection].close()
    for side in (trip.source, trip.destination):
        side.until(Status.FAILED)
    assert trip.source.error
    trip.verify_source()


def test_cancel(journey):
    trip = journey(hammer(), capabilities=MULTIFD, parameters=NEVER_ENDS)
    trip.migrate()
    trip.source.wait_rounds(2)
    trip.source.control.cancel()
    trip.source.until(Status.CANCELLED)
    trip.destination.until(Status.FAILED)
    trip.verify_source()


@pytest.mark.parametrize(
    ("source", "destination", "complaint"),
    [
        (4, 2, "is greater than number of channels 2; set multifd-channels to the same"),
        (
            2,
            4,
            "the source has opened 2 of 4 channels within 0.5 s; set multifd and multifd-channels",
        ),
    ],
)
def test_another_number_of_channels_is_refused(journey, source, destination, complaint):
    trip = journey(hammer(), capabilities=MULTIFD)
    set_channels(trip, source, destination)
    trip.migrate()
    refused_at_both(trip, complaint)


@pytest.mark.parametrize("where", ["source", "destination"])
def test_only_at_one_side_is_refused(journey, where):
    trip = journey(hammer())
    getattr(trip, where).set(MULTIFD)
    set_channels(trip, 2, 2)
    trip.migrate()
    refused_at_both(trip, "opened 0 of 2 channels" if where == "destination" else "")
    if where == "source":  # whichever side notices it first
        told = f"{trip.source.error} / {trip.destination.error}"
        assert "is multifd switched on there" in told or "multifd is off here" in told


@pytest.mark.parametrize("uri", ["exec:cat", "file:/nowhere", "fd:1"])
def test_a_transport_of_one_connection_is_refused(journey, uri):
    trip = journey(hammer(), capabilities=MULTIFD)
    for order in (trip.source.control.migrate, trip.destination.control.incoming):
        with pytest.raises(Refused, match=r"^Migration requires multi-channel URIs"):
            order(uri)
    assert trip.source.status is Status.NONE
