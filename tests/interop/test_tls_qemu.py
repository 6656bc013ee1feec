"""Encrypted migrations between us and a real QEMU, whose TLS is GnuTLS, in both roles."""

import re

import pytest

from fakes.certificates import Certificates
from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.waiting import wait_until
from faults.relay import Relay
from interop.arrival import check_arrived, check_goes_on, check_memory, iterations, send_to_qemu
from interop.our_guest import TIMEOUT_S, OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu(*ALL)

MEMORY_BYTES = 32 * MIB
PREEMPT = (Capability.POSTCOPY_RAM, Capability.POSTCOPY_PREEMPT)
SLOW = {"max-bandwidth": 20 * MIB, "downtime-limit": 0, "max-postcopy-bandwidth": 2 * MIB}
HOSTNAME = {"tls-hostname": "localhost"}


@pytest.fixture
def workload():
    need("kvm")
    return workloads.load("hammer", MEMORY_BYTES, 2, hot_bytes=8 * MIB)


@pytest.fixture
def qemu(tmp_path):
    with QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES, 2) as qemu:
        yield qemu


@pytest.fixture
def relay():
    with Relay("tcp:127.0.0.1:0", "tcp:127.0.0.1:1") as relay:
        yield relay


def encrypted(qemu, folder, endpoint):
    """QEMU's next migration; names are checked against the address of the relay."""
    arguments = {"dir": str(folder), "endpoint": endpoint, "verify-peer": True}
    qemu("object-add", **{"qom-type": "tls-creds-x509", "id": endpoint}, **arguments)
    qemu("migrate-set-parameters", **{"tls-creds": endpoint} | HOSTNAME)


def ours_encrypted(ours, folder, endpoint):
    arguments = {"dir": str(folder), "endpoint": endpoint}
    ours.migration.objects.add("tls-creds-x509", endpoint, arguments)
    ours.migration.set_parameters({"tls-creds": endpoint} | HOSTNAME)


def check_back(ours, workload, qemu):
    ours.migration.progress.wait(Status.COMPLETED, timeout=TIMEOUT_S)
    qemu.wait_migration("completed")
    read = ours.machine.read_memory
    check_goes_on(read, workload, iterations(qemu.read_memory, workload))
    ours.machine.stop()
    check_memory(read, workload)


def check_unreadable(relay):
    assert b"microvm.ram" not in b"".join(
        bytes(data) for each in relay.connections for data in each.recorded.values()
    )


@pytest.mark.proves(Way.TO, Feature.TLS)
def test_to_qemu_by_precopy(workload, qemu, relay, tls_host):
    with OurGuest.running(workload, "kvm") as ours:
        encrypted(qemu, tls_host, "server")
        ours_encrypted(ours, tls_host, "client")
        relay.target = qemu.listen("tcp:127.0.0.1:0")
        ours.migration.migrate(relay.uri)
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        check_arrived(qemu, workload, ours)
        check_unreadable(relay)


@pytest.mark.proves(Way.FROM, Feature.TLS)
def test_from_qemu_by_precopy(workload, qemu, relay, tls_host):
    with OurGuest.waiting(workload, "kvm") as ours:
        send_to_qemu(workload, qemu)
        encrypted(qemu, tls_host, "client")
        ours_encrypted(ours, tls_host, "server")
        qemu.parameters(max_bandwidth=1 << 40)
        relay.target = ours.listen("tcp:127.0.0.1:0")
        qemu("migrate", uri=relay.uri)
        check_back(ours, workload, qemu)
        check_unreadable(relay)


@pytest.mark.proves(Way.TO, Feature.TLS_RECOVERY, Feature.PREEMPT_RECOVERY)
def test_to_qemu_by_postcopy_with_a_break(workload, qemu, relay, tls_host):
    with OurGuest.running(workload, "kvm") as ours:
        encrypted(qemu, tls_host, "server")
        ours_encrypted(ours, tls_host, "client")
        qemu.capabilities(*PREEMPT)
        ours.switch_on(*PREEMPT)
        ours.migration.set_parameters(SLOW)
        relay.target = qemu.listen("tcp:127.0.0.1:0")
        ours.migration.migrate(relay.uri)
        ours.migration.start_postcopy()
        ours.migration.progress.wait(Status.POSTCOPY_ACTIVE, timeout=TIMEOUT_S)
        wait_until(lambda: ours.migration.info().ram.postcopy_requests > 4, TIMEOUT_S)
        relay.break_all()
        ours.migration.progress.wait(Status.POSTCOPY_PAUSED, timeout=TIMEOUT_S)
        qemu.wait_migration("postcopy-paused")
        qemu("migrate-recover", uri="tcp:127.0.0.1:0")
        (address,) = qemu("query-migrate")["socket-address"]
        ours.migration.set_parameters({"max-postcopy-bandwidth": 0})
        ours.migration.migrate(f"tcp:{address['host']}:{address['port']}", resume=True)
        ours.migration.progress.wait(Status.POSTCOPY_ACTIVE, Status.COMPLETED, timeout=TIMEOUT_S)
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        check_arrived(qemu, workload, ours)
        check_unreadable(relay)


@pytest.mark.proves(Way.FROM, Feature.TLS_RECOVERY, Feature.PREEMPT_RECOVERY)
def test_from_qemu_by_postcopy_with_a_break(workload, qemu, relay, tls_host):
    with OurGuest.waiting(workload, "kvm") as ours:
        send_to_qemu(workload, qemu)
        encrypted(qemu, tls_host, "client")
        ours_encrypted(ours, tls_host, "server")
        qemu.capabilities(*PREEMPT)
        ours.switch_on(*PREEMPT)
        relay.target = ours.listen("tcp:127.0.0.1:0")
        qemu.send_by_postcopy(relay.uri, max_postcopy_bandwidth=MIB)
        ours.migration.progress.wait(Status.POSTCOPY_ACTIVE, timeout=TIMEOUT_S)
        qemu.wait_migration("postcopy-active")
        relay.break_all()
        ours.migration.progress.wait(Status.POSTCOPY_PAUSED, timeout=TIMEOUT_S)
        qemu.wait_migration("postcopy-paused")
        ours.migration.recover("tcp:127.0.0.1:0")
        (address,) = ours.migration.info().socket_address
        qemu.parameters(max_postcopy_bandwidth=0)
        qemu("migrate", uri=f"tcp:127.0.0.1:{address['port']}", resume=True)
        check_back(ours, workload, qemu)
        check_unreadable(relay)


@pytest.mark.qemu
@pytest.mark.proves(Way.TO, Feature.REFUSED)
def test_a_foreign_certificate_is_refused_by_qemu(workload, qemu, tls_host, tmp_path):
    with OurGuest.running(workload, "kvm") as ours:
        encrypted(qemu, tls_host, "server")
        made = Certificates(tmp_path / "foreign").host()
        (made / "ca-cert.pem").write_bytes((tls_host / "ca-cert.pem").read_bytes())
        ours_encrypted(ours, made, "client")
        ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0", exit_on_error=False))
        assert ours.wait_end() is Status.FAILED
        assert re.search("refuses? this side's (TLS|certificate)", ours.error)
        assert ours.machine.running
        assert ours.migration.info().ram.normal == 0


@pytest.mark.qemu
@pytest.mark.proves(Way.FROM, Feature.TLS)
def test_a_foreign_certificate_of_qemu_is_refused(workload, qemu, tls_host, tmp_path, capfd):
    with OurGuest.waiting(workload, "kvm") as ours:
        send_to_qemu(workload, qemu)
        made = Certificates(tmp_path / "foreign").host()
        (made / "ca-cert.pem").write_bytes((tls_host / "ca-cert.pem").read_bytes())
        ours_encrypted(ours, tls_host, "server")
        qemu("migrate-set-parameters", **{"tls-hostname": "localhost"})
        arguments = {"dir": str(made), "endpoint": "client", "sanity-check": False}
        qemu("object-add", **{"qom-type": "tls-creds-x509", "id": "bad"}, **arguments)
        qemu("migrate-set-parameters", **{"tls-creds": "bad"})
        qemu("migrate", uri=ours.listen("tcp:127.0.0.1:0"))
        qemu.wait_migration("failed")
        assert not ours.machine.owned
        assert "the peer's certificate is refused" in capfd.readouterr().err


@pytest.mark.qemu
@pytest.mark.proves(Way.TO, Feature.TLS)
def test_names_are_those_that_qemu_checks(workload, qemu, tls_host):
    """``tls-authz`` there takes the name that is in the certificate here, and no other."""
    with OurGuest.running(workload, "kvm") as ours:
        encrypted(qemu, tls_host, "server")
        qemu("object-add", **{"qom-type": "authz-simple", "id": "a", "identity": "CN=localhost"})
        qemu("migrate-set-parameters", **{"tls-authz": "a"})
        ours_encrypted(ours, tls_host, "client")
        ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0"))
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        check_arrived(qemu, workload, ours)
