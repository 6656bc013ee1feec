"""Channels of multifd between us and a real QEMU, in both roles."""

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.waiting import wait_until
from interop.arrival import check_arrived, check_back, send_to_qemu
from interop.our_guest import TIMEOUT_S, OurGuest
from interop.qemu_guest import QemuGuest
from interop.test_tls_qemu import encrypted, ours_encrypted
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu("10.0", "11.1")

MEMORY_BYTES = 32 * MIB
THREE = {"multifd-channels": 3}
POSTCOPY = (Capability.MULTIFD, Capability.POSTCOPY_RAM, Capability.POSTCOPY_PREEMPT)
SOME_BYTES = 2 * MIB
LIMITS = {"max-bandwidth": 1 << 40, "downtime-limit": 5000}


@pytest.fixture
def workload():
    need("kvm")
    return workloads.load("hammer", MEMORY_BYTES, 2, hot_bytes=8 * MIB)


def parameters(channels, compression, zeros):
    return {
        "multifd-channels": channels,
        "multifd-compression": compression,
        "multifd-zlib-level": 2,
        "multifd-zstd-level": 3,
        "zero-page-detection": zeros,
    }


@pytest.mark.proves(Way.FROM, Feature.MULTIFD)
@pytest.mark.parametrize(
    ("accelerator", "channels", "compression", "zeros"),
    [
        ("kvm", 2, "none", "multifd"),
        ("kvm", 4, "zlib", "legacy"),
        ("tcg", 16, "zstd", "none"),
    ],
)
def test_back_from_qemu(tmp_path, workload, accelerator, channels, compression, zeros):
    come_back(tmp_path, workload, accelerator, parameters(channels, compression, zeros))


@pytest.mark.qemu("7.2")
@pytest.mark.proves(Way.FROM, Feature.MULTIFD)
def test_back_from_a_qemu_that_sends_no_flushes(tmp_path, workload):
    """The end of each section is one, and the main channel has all zero pages."""
    come_back(tmp_path, workload, "kvm", {"multifd-channels": 2})


@pytest.mark.qemu("7.2", "10.0", "11.1")
@pytest.mark.proves(Way.FROM, Feature.ZERO_COPY)
def test_back_from_a_qemu_that_copies_nothing(tmp_path, workload):
    come_back(tmp_path, workload, "kvm", {"multifd-channels": 2}, "zero-copy-send")


@pytest.mark.proves(Way.TO, Feature.ZERO_COPY)
def test_to_qemu_without_a_copy(tmp_path, workload):
    with (
        QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES, 2) as qemu,
        OurGuest.running(workload, "kvm") as ours,
    ):
        qemu.capabilities("multifd")
        ours.switch_on(Capability.MULTIFD, Capability.ZERO_COPY_SEND)
        # At this pace the guest writes faster than it is sent.
        ours.migration.set_parameters({"downtime-limit": 0, "max-bandwidth": 100 * MIB})
        ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0"))
        wait_until(lambda: ours.events.count("MIGRATION_PASS") > 3, 20, "no fourth round")
        ours.migration.set_parameters(LIMITS)
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        check_arrived(qemu, workload, ours)
        assert (
            ours.migration.info().ram.dirty_sync_missed_zero_copy > 0
        )  # over loopback all is copied


def come_back(folder, workload, accelerator, settings, *capabilities):
    with (
        QemuGuest(folder, "microvm", accelerator, MEMORY_BYTES, 2) as qemu,
        OurGuest.waiting(workload, "kvm") as ours,
    ):
        send_to_qemu(workload, qemu)
        qemu.capabilities("multifd", *capabilities)
        qemu("migrate-set-parameters", **settings, **LIMITS)
        ours.switch_on(Capability.MULTIFD)
        ours.migration.set_parameters({"multifd-channels": settings["multifd-channels"]})
        qemu("migrate", uri=ours.listen("tcp:127.0.0.1:0"))
        check_back(ours, workload, qemu)


@pytest.mark.proves(Way.TO, Feature.MULTIFD)
@pytest.mark.parametrize(
    ("accelerator", "channels", "compression", "zeros"),
    [
        ("kvm", 16, "none", "multifd"),
        ("tcg", 2, "zlib", "legacy"),
        ("kvm", 4, "zstd", "none"),
    ],
)
def test_to_qemu(tmp_path, workload, accelerator, channels, compression, zeros):
    settings = parameters(channels, compression, zeros)
    with (
        QemuGuest(tmp_path, "microvm", accelerator, MEMORY_BYTES, 2) as qemu,
        OurGuest.running(workload, "kvm") as ours,
    ):
        qemu.capabilities("multifd")
        qemu("migrate-set-parameters", **settings)
        ours.switch_on(Capability.MULTIFD)
        ours.migration.set_parameters(settings | {"downtime-limit": 5000})
        ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0"))
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        check_arrived(qemu, workload, ours)
        assert ours.migration.info().ram.multifd_bytes > 0


@pytest.fixture
def qemu(tmp_path):
    with QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES, 2) as qemu:
        yield qemu


def both(qemu, ours, folder, of_qemu, *capabilities):
    """Switch the same on at both sides, for three channels that are encrypted."""
    encrypted(qemu, folder, of_qemu)
    ours_encrypted(ours, folder, "client" if of_qemu == "server" else "server")
    qemu.capabilities(*capabilities)
    ours.switch_on(*capabilities)
    qemu("migrate-set-parameters", **THREE)
    ours.migration.set_parameters(THREE)


@pytest.mark.qemu(*ALL)
@pytest.mark.proves(Way.TO, Feature.MULTIFD_TLS)
def test_encrypted_to_qemu(workload, qemu, tls_host):
    with OurGuest.running(workload, "kvm") as ours:
        both(qemu, ours, tls_host, "server", Capability.MULTIFD)
        ours.migration.set_parameters({"downtime-limit": 5000})
        ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0"))
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        check_arrived(qemu, workload, ours)
        assert ours.migration.info().ram.multifd_bytes > 0


@pytest.mark.qemu(*ALL)
@pytest.mark.proves(Way.FROM, Feature.MULTIFD_TLS)
def test_encrypted_back_from_qemu(workload, qemu, tls_host):
    with OurGuest.waiting(workload, "kvm") as ours:
        send_to_qemu(workload, qemu)
        both(qemu, ours, tls_host, "client", Capability.MULTIFD)
        qemu("migrate-set-parameters", **LIMITS)
        qemu("migrate", uri=ours.listen("tcp:127.0.0.1:0"))
        check_back(ours, workload, qemu)


@pytest.mark.qemu("11.1")
@pytest.mark.proves(Way.TO, Feature.MULTIFD_POSTCOPY)
def test_to_qemu_by_postcopy(workload, qemu, tls_host):
    """Postcopy goes over the main and the preempt channel."""
    with OurGuest.running(workload, "kvm") as ours:
        both(qemu, ours, tls_host, "server", *POSTCOPY)
        ours.migration.set_parameters({"downtime-limit": 0, "max-bandwidth": 10 * MIB})
        ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0"))
        wait_until(lambda: ours.migration.info().ram.multifd_bytes > SOME_BYTES, TIMEOUT_S)
        ours.migration.start_postcopy()
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        check_arrived(qemu, workload, ours)
        assert ours.migration.info().ram.postcopy_bytes > 0


@pytest.mark.qemu("11.1")
@pytest.mark.proves(Way.FROM, Feature.MULTIFD_POSTCOPY)
def test_back_from_qemu_by_postcopy(workload, qemu, tls_host):
    with OurGuest.waiting(workload, "kvm") as ours:
        send_to_qemu(workload, qemu)
        both(qemu, ours, tls_host, "client", *POSTCOPY)
        qemu.parameters(max_bandwidth=10 * MIB, downtime_limit=1)
        qemu("migrate", uri=ours.listen("tcp:127.0.0.1:0"))
        wait_until(
            lambda: qemu("query-migrate").get("ram", {}).get("multifd-bytes", 0) > SOME_BYTES,
            TIMEOUT_S,
        )
        qemu("migrate-start-postcopy")
        check_back(ours, workload, qemu)
        assert qemu("query-migrate")["ram"]["postcopy-bytes"] > 0
