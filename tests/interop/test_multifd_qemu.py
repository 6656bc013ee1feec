"""Channels of multifd between us and a real QEMU, in both roles."""

import pytest

from interop.arrival import check_arrived, check_back, send_to_qemu
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu("10.0", "11.1")

MEMORY_BYTES = 32 * MIB
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
def test_back_from_a_qemu_that_sends_no_flushes(tmp_path, workload):
    """The end of each section is one, and the main channel has all zero pages."""
    come_back(tmp_path, workload, "kvm", {"multifd-channels": 2})


def come_back(folder, workload, accelerator, settings):
    with (
        QemuGuest(folder, "microvm", accelerator, MEMORY_BYTES, 2) as qemu,
        OurGuest.waiting(workload, "kvm") as ours,
    ):
        send_to_qemu(workload, qemu)
        qemu.capabilities("multifd")
        qemu("migrate-set-parameters", **settings, **LIMITS)
        ours.switch_on(Capability.MULTIFD)
        ours.migration.set_parameters({"multifd-channels": settings["multifd-channels"]})
        qemu("migrate", uri=ours.listen("tcp:127.0.0.1:0"))
        check_back(ours, workload, qemu)


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
