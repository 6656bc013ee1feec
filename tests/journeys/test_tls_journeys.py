"""Whole migrations over encrypted channels."""

import contextlib
import re

import pytest

from fakes.pair import NEVER_ENDS, POSTCOPY, TRICKLE, hammer, idle
from fakes.waiting import wait_until
from faults.relay import Relay, Way
from journeys.test_preempt import PREEMPT, begin, recover, wait_paused
from postcopy.errors import HostCannot, Refused
from postcopy.status import Status

NO_LIMIT = NEVER_ENDS | {"max-postcopy-bandwidth": 0}
LIMITED = NEVER_ENDS | {"max-bandwidth": 1 << 30, "max-postcopy-bandwidth": 32 << 20}


@pytest.fixture
def relay():
    with Relay("tcp:127.0.0.1:0", "tcp:127.0.0.1:1") as relay:
        yield relay


def all_bytes(relay):
    return b"".join(
        bytes(connection.recorded[way]) for connection in relay.connections for way in Way
    )


def test_precopy(journey, tls_host):
    trip = journey(hammer(vcpus=2), tls=tls_host)
    trip.migrate()
    trip.finish()


def test_over_a_unix_socket(journey, tls_host, tmp_path):
    trip = journey(idle(), tls=tls_host)
    trip.migrate(f"unix:{tmp_path}/socket")
    trip.finish()


@pytest.mark.parametrize("capabilities", [POSTCOPY, PREEMPT], ids=["one", "preempt"])
@pytest.mark.parametrize("parameters", [NO_LIMIT, LIMITED], ids=["fast", "limited"])
def test_postcopy(journey, tls_host, capabilities, parameters):
    """With a limit, the pushing thread polls for requests."""
    trip = journey(hammer(vcpus=2), capabilities=capabilities, parameters=parameters, tls=tls_host)
    begin(trip)
    trip.finish()


@pytest.mark.parametrize("capabilities", [POSTCOPY, PREEMPT], ids=["one", "preempt"])
def test_nothing_can_be_read_on_the_way_and_a_cut_is_recovered(
    journey, tls_host, relay, capabilities
):
    trip = journey(hammer(vcpus=2), capabilities=capabilities, parameters=TRICKLE, tls=tls_host)
    begin(trip, relay)
    trip.source.wait(Status.POSTCOPY_ACTIVE)
    relay.break_all()
    wait_paused(trip)
    recover(trip, relay)
    trip.source.wait(Status.POSTCOPY_ACTIVE)
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    trip.finish()
    assert len(relay.connections) == 2 * (1 + (capabilities is PREEMPT))
    seen = all_bytes(relay)
    assert len(seen) > 1 << 20
    for readable in (b"QEVM", b"microvm.ram", b"serial"):
        assert readable not in seen


# --- who is refused


def refused(trip, where=None):
    """The source fails, its guest runs on, and the destination has got nothing."""
    trip.source.control.migrate(where or trip.destination.listen())
    trip.source.wait(Status.FAILED)
    assert trip.source.machine.running
    assert not trip.destination.machine.owned
    if trip.destination.status is not Status.FAILED:
        assert not trip.destination.received().any()
    ram = trip.source.control.info().ram
    assert ram is None or ram.normal == 0
    return trip.source.error


@pytest.mark.parametrize(
    ("of_source", "why"),
    [
        (lambda made: made.foreign(), "peer refuses this side's TLS: (unknown ca|decrypt error)"),
        (lambda made: made.host(days=-1), "peer refuses this side's TLS: certificate expired"),
    ],
    ids=["foreign", "expired"],
)
def test_a_source_with_a_wrong_certificate(journey, certificates, tls_host, of_source, why):
    trip = journey(hammer())
    trip.source.use_tls(of_source(certificates))
    trip.destination.use_tls(tls_host)

    assert re.search(why, refused(trip))
    good = certificates.host(days=29)  # it listens still
    trip.source.control.objects.remove("tls")
    trip.source.use_tls(good)
    (found,) = trip.destination.control.info().socket_address
    trip.source.control.migrate(f"tcp:127.0.0.1:{found['port']}")
    trip.finish()


def test_a_destination_of_another_name(journey, certificates, tls_host):
    trip = journey(hammer())
    trip.source.use_tls(tls_host)
    trip.destination.use_tls(certificates.host("other.example"))
    assert "Hostname mismatch" in refused(trip)


def test_a_source_that_tls_authz_does_not_name(journey, tls_host):
    trip = journey(hammer())
    trip.source.use_tls(tls_host)
    trip.destination.control.objects.add("authz-simple", "who", {"identity": "CN=someone"})
    trip.destination.use_tls(tls_host, **{"tls-authz": "who"})
    refused(trip)


def test_a_plain_source_at_a_destination_with_tls(journey, tls_host):
    trip = journey(hammer())
    trip.destination.use_tls(tls_host)
    trip.source.control.migrate(trip.destination.listen())
    trip.source.wait(Status.FAILED)
    assert "the destination speaks TLS; set tls-creds here too" in trip.source.error
    assert not trip.destination.received().any()


def test_a_source_with_tls_at_a_plain_destination(journey, tls_host):
    trip = journey(hammer())
    trip.source.use_tls(tls_host)
    trip.source.control.migrate(trip.destination.listen())
    trip.destination.wait(Status.FAILED)
    trip.source.wait(Status.FAILED)
    assert "see that tls-creds is set there" in trip.source.error
    assert "the source speaks TLS; set tls-creds here too" in trip.destination.error


# --- what is refused before anything moves


@pytest.fixture
def source(journey):
    with contextlib.closing(journey(idle())) as trip:
        yield trip.source


def test_what_is_no_credentials_is_refused(source, tls_host):
    source.set(parameters={"tls-creds": "none"})
    with pytest.raises(Refused, match="No TLS credentials with id 'none'"):
        source.control.migrate("tcp:127.0.0.1:1")
    source.control.objects.add("authz-simple", "none", {"identity": "CN=x"})
    with pytest.raises(Refused, match="Object with id 'none' is not TLS credentials"):
        source.control.migrate("tcp:127.0.0.1:1")
    arguments = {"dir": str(tls_host), "endpoint": "server"}
    source.control.objects.add("tls-creds-x509", "theirs", arguments)
    source.set(parameters={"tls-creds": "theirs"})
    with pytest.raises(Refused, match="Expected TLS credentials for a client endpoint"):
        source.control.migrate("tcp:127.0.0.1:1")
    with pytest.raises(Refused, match="attempt to add duplicate property 'theirs'"):
        source.control.objects.add("tls-creds-x509", "theirs", arguments)
    source.control.objects.remove("theirs")
    with pytest.raises(Refused, match="object 'theirs' not found"):
        source.control.objects.remove("theirs")
    with pytest.raises(HostCannot, match="use certificates: tls-creds-x509"):
        source.control.objects.add("tls-creds-psk", "psk", {"dir": str(tls_host)})


def test_what_cannot_be_encrypted_is_refused(source, tls_host, tmp_path):
    source.use_tls(tls_host)
    with pytest.raises(Refused, match="cannot be encrypted"):
        source.control.migrate(f"file:{tmp_path}/image")
    source.set(parameters={"tls-hostname": ""})
    with pytest.raises(Refused, match="set tls-hostname"):
        source.control.migrate(f"unix:{tmp_path}/socket")
    assert not (tmp_path / "image").exists()
    wait_until(lambda: source.machine.running)
