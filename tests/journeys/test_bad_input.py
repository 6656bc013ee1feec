"""What cannot work: one clear error that names the thing, and a guest that runs on where it was."""

import os
import signal
import socket
from contextlib import contextmanager
from dataclasses import replace

import pytest

from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK, hammer
from fakes.waiting import wait_until
from postcopy.errors import CannotListen, GuestError, HostCannot, Refused, WrongState
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.machine.machine import Machine
from postcopy.parameters import Capability
from postcopy.status import Status
from postcopy.stream.records import RequestPages
from postcopy.stream.return_path import encode_message

MIB = 1 << 20


def refused(trip, *says):
    """Both sides have failed; the destination says what is wrong, and the guest stays."""
    trip.source.wait(Status.FAILED)
    trip.destination.wait(Status.FAILED)
    for side in (trip.source, trip.destination):
        assert side.error
        assert "\n" not in side.error
    for word in says:
        assert word in trip.destination.error, trip.destination.error
    assert not trip.destination.machine.running
    trip.verify_source()


def next_one_succeeds(trip):
    trip.kind = Machine
    trip.new_destination()
    trip.source.set(parameters=QUICK)
    trip.migrate()
    trip.finish()


class OtherBlock(Machine):
    def regions(self):
        return [replace(region, name="pc.ram") for region in super().regions()]


class OtherPages(Machine):
    def regions(self):
        return [replace(region, page_size_bytes=2 * MIB) for region in super().regions()]


class Unwilling(Machine):
    machine_name = "pc-q35-10.0"


class OtherDevices(Machine):
    def load_devices(self, states):
        raise GuestError(f"device '{states[0].name}' is of another version")


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:1", "unix:/nonexistent/socket"])
def test_nobody_listens(journey, uri):
    trip = journey(hammer())
    trip.source.control.migrate(uri)
    trip.source.wait(Status.FAILED)
    assert trip.source.error.startswith(f"Failed to connect to '{uri.split(':', 1)[1]}': ")
    trip.verify_source()
    next_one_succeeds(trip)


@pytest.mark.parametrize("uri", ["bad:1", "tcp:nowhere", "", "fd:nobody"])
def test_no_address(journey, uri):
    trip = journey(hammer())
    with pytest.raises(Refused):
        trip.source.control.migrate(uri)
    assert trip.source.status is Status.NONE
    with pytest.raises(Refused):
        trip.destination.control.incoming(uri)
    assert trip.destination.status is Status.NONE
    next_one_succeeds(trip)


@contextmanager
def peer_of(trip, tmp_path):
    """Migrate to a socket of the test's own; the other end of the connection."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(f"{tmp_path}/door")
        door.listen(1)
        trip.source.control.migrate(f"unix:{tmp_path}/door")
        peer, _ = door.accept()
        with peer:
            yield peer


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", os.urandom(4096)])
def test_a_peer_that_is_no_destination(journey, tmp_path, answer):
    trip = journey(hammer(), parameters=NEVER_ENDS)
    with peer_of(trip, tmp_path) as peer:
        peer.sendall(answer)
    trip.source.wait(Status.FAILED)
    assert trip.source.error
    trip.verify_source()


def test_a_page_that_is_asked_for_before_it_can_be_missing(journey, tmp_path):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=NEVER_ENDS)
    block = trip.source.machine.regions()[0].name
    with peer_of(trip, tmp_path) as peer:
        peer.sendall(encode_message(RequestPages(block, 0, 4096)))
        trip.source.wait(Status.FAILED)
    assert "asks for a page before it can miss one" in trip.source.error
    assert f"block {block}, offset 0x0" in trip.source.error
    trip.verify_source()


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "header"), (b"GET / HTTP/1.1\r\n\r\n", "Not a migration stream")],
)
def test_a_peer_that_is_no_source(journey, tmp_path, data, says):
    trip = journey(hammer())
    uri = trip.destination.listen(f"unix:{tmp_path}/door")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(uri.removeprefix("unix:"))
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        trip.destination.wait(Status.FAILED)
    assert says in trip.destination.error
    assert not trip.destination.machine.owned
    trip.verify_source()


def test_other_memory_size(journey):
    trip = journey(hammer())
    trip.new_destination(memory_bytes=128 * MIB)
    trip.migrate()
    refused(trip, "microvm.ram", "Size mismatch")
    next_one_succeeds(trip)


def test_other_block(journey):
    trip = journey(hammer(), kind=OtherBlock)
    trip.migrate()
    refused(trip, "Unknown ramblock", "microvm.ram")


def test_other_machine(journey):
    trip = journey(hammer(), kind=Unwilling)
    trip.migrate()
    refused(trip, "Machine type", "microvm", "pc-q35-10.0")


def test_other_page_size(journey):
    trip = journey(hammer(), kind=OtherPages, capabilities=POSTCOPY)
    trip.migrate()
    refused(trip, "Postcopy needs matching RAM page sizes (s=1000 d=201000)")
    next_one_succeeds(trip)


def test_other_devices_after_the_guest_was_given_up(journey):
    trip = journey(hammer(), kind=OtherDevices, capabilities=POSTCOPY, parameters=NEVER_ENDS)
    trip.migrate()
    trip.source.control.start_postcopy()
    refused(trip, "is of another version")
    told = trip.source.story()
    told = told[told.index("device") :][:5]  # and then it was stopped, to be looked at
    assert told == ["device", "PASS 2", "postcopy-device", "RESUME", "failed"]
    told = trip.destination.story()
    assert told[told.index("active") :] == ["active", "postcopy-device", "failed"]


@pytest.mark.parametrize(("ours", "theirs"), [(2, 1), (1, 2)])
def test_other_vcpu_count(journey, ours, theirs):
    trip = journey(hammer(vcpus=ours))
    trip.new_destination(vcpus=theirs)
    trip.migrate()
    refused(trip, f"the stream has {ours} vCPUs, this machine {theirs}")


def test_postcopy_at_the_source_alone(journey):
    trip = journey(hammer())
    trip.source.set(POSTCOPY)
    trip.migrate()
    refused(trip, "RAM postcopy is disabled but have 16 byte advise")
    next_one_succeeds_with_both = trip.new_destination()
    next_one_succeeds_with_both.set(POSTCOPY)
    trip.migrate()
    trip.finish()


def test_postcopy_at_the_destination_alone_is_precopy(journey):
    trip = journey(hammer())
    trip.destination.set(POSTCOPY)
    trip.migrate()
    trip.finish()


def test_a_port_in_use(journey):
    trip = journey(hammer())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        uri = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CannotListen, match="Address already in use"):
            trip.destination.control.incoming(uri)
    assert trip.destination.status is Status.NONE
    trip.migrate()  # the same destination, at another address
    trip.finish()


def test_no_userfaultfd(journey, monkeypatch):
    trip = journey(hammer())

    def lacking(*_, **__):
        raise HostCannot("no userfaultfd", "sysctl vm.unprivileged_userfaultfd=1")

    monkeypatch.setattr(Userfaultfd, "open", lacking)
    with pytest.raises(HostCannot, match=r"^Postcopy is not supported: no userfaultfd"):
        trip.destination.set([Capability.POSTCOPY_RAM])
    assert not trip.destination.control.capabilities.enabled(Capability.POSTCOPY_RAM)


def test_userfaultfd_is_gone_when_it_is_needed(journey, monkeypatch):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters={"x-dirty-tracking": "kvm"})

    def lacking(*_, **__):
        raise HostCannot("no userfaultfd", "sysctl vm.unprivileged_userfaultfd=1")

    where = trip.destination.listen()
    monkeypatch.setattr(Userfaultfd, "open", lacking)
    trip.source.control.migrate(where)
    refused(trip, "no userfaultfd")
    monkeypatch.undo()
    next_one_succeeds(trip)


@pytest.mark.parametrize("capabilities", [(), POSTCOPY], ids=["plain", "advised"])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_an_engine_is_killed_before_switchover(journey, side, capabilities):
    trip = journey(hammer(), parameters=NEVER_ENDS, capabilities=capabilities)
    trip.migrate()
    trip.source.wait(Status.ACTIVE)
    trip.destination.wait(Status.ACTIVE)
    os.kill(getattr(trip, side).engine_process_id(), signal.SIGKILL)
    trip.source.wait(Status.FAILED)
    trip.destination.wait(Status.FAILED)
    assert "engine process died" in getattr(trip, side).error
    refused(trip)
    next_one_succeeds(trip)


def test_an_engine_is_killed_while_the_guest_stands_still(journey):
    trip = journey(hammer(), capabilities=[Capability.PAUSE_BEFORE_SWITCHOVER])
    trip.migrate()
    trip.source.wait(Status.PRE_SWITCHOVER)
    os.kill(trip.source.engine_process_id(), signal.SIGKILL)
    refused(trip)


def test_a_failed_destination_tells_its_owner(journey):
    trip = journey(hammer())
    trip.destination.control.incoming("tcp:127.0.0.1:0")
    address = trip.destination.control.info().socket_address[0]
    with socket.create_connection((address["host"], int(address["port"]))) as peer:
        peer.sendall(b"no stream")
    wait_until(lambda: trip.destination.failures, 20, "told")
    assert "Not a migration stream" in trip.destination.failures[0]


def test_one_migration_at_a_time(journey):
    trip = journey(hammer(), parameters=NEVER_ENDS)
    trip.migrate()
    with pytest.raises(WrongState, match="There's a migration process in progress"):
        trip.source.control.migrate("tcp:127.0.0.1:1")
    with pytest.raises(WrongState, match="There's a migration process in progress"):
        trip.source.set(POSTCOPY)
    with pytest.raises(WrongState, match="The incoming migration has already been started"):
        trip.destination.control.incoming("tcp:127.0.0.1:0")
    with pytest.raises(WrongState, match="Migration not in expected state"):
        trip.source.control.continue_(Status.PRE_SWITCHOVER)
    trip.source.set(parameters=QUICK)
    trip.finish()


def test_a_guest_that_is_not_here_cannot_be_sent(journey):
    trip = journey(hammer())
    with pytest.raises(WrongState, match="Guest is waiting for an incoming migration"):
        trip.destination.control.migrate("tcp:127.0.0.1:1")
    with pytest.raises(WrongState, match="'-incoming' was not specified on the command line"):
        trip.source.control.incoming("tcp:127.0.0.1:0")
    trip.migrate()
    trip.finish()
    with pytest.raises(WrongState, match="the destination runs the guest"):
        trip.source.control.migrate("tcp:127.0.0.1:1")
