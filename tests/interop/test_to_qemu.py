"""Our running guest moves to a real QEMU and goes on counting there."""

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.waiting import wait_until
from interop.arrival import check_arrived
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu(*ALL)

MEMORY_BYTES = 32 * MIB
HOT_BYTES = 8 * MIB
KVM = pytest.mark.proves(Way.TO, Feature.KVM)
TCG = pytest.mark.proves(Way.TO, Feature.TCG)
TCP = pytest.mark.proves(Way.TO, Feature.TCP)
UNIX = pytest.mark.proves(Way.TO, Feature.UNIX)


def hammer(vcpus):
    return workloads.load("hammer", MEMORY_BYTES, vcpus, hot_bytes=HOT_BYTES)


def our_guest(workload, accelerator, qemu):
    need(accelerator)
    return OurGuest.running(workload, accelerator, machine_type=qemu.machine)


def address(way, folder):
    return f"unix:{folder / 'migration'}" if way == "unix" else "tcp:127.0.0.1:0"


@pytest.mark.parametrize(
    ("machine", "accelerator", "vcpus", "way"),
    [
        pytest.param("microvm", "kvm", 1, "tcp", marks=[KVM, TCP]),
        pytest.param("microvm", "kvm", 2, "unix", marks=[KVM, UNIX]),
        pytest.param("microvm", "tcg", 1, "unix", marks=[TCG, UNIX]),
        pytest.param("microvm", "tcg", 2, "tcp", marks=[TCG, TCP]),
        pytest.param("none", "kvm", 1, "unix", marks=[KVM, UNIX]),
        pytest.param("none", "tcg", 1, "tcp", marks=[TCG, TCP]),
    ],
)
class TestOurRunningGuest:
    """``none`` has no machine with more than one CPU."""

    @pytest.mark.proves(Way.TO, Feature.PRECOPY)
    def test_by_precopy(self, tmp_path, machine, accelerator, vcpus, way):
        workload = hammer(vcpus)
        with (
            QemuGuest(tmp_path, machine, accelerator, MEMORY_BYTES, vcpus) as qemu,
            our_guest(workload, "kvm", qemu) as ours,
        ):
            qemu.capabilities("events")
            ours.migration.migrate(qemu.listen(address(way, tmp_path)))
            assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
            check_arrived(qemu, workload, ours)
            assert qemu.statuses() == ["setup", "active", "completed"]

    @pytest.mark.proves(Way.TO, Feature.POSTCOPY, Feature.BLOCKTIME)
    @pytest.mark.parametrize("when", ["at once", "after a round"])
    def test_by_postcopy(self, tmp_path, machine, accelerator, vcpus, way, when):
        workload = hammer(vcpus)
        with (
            QemuGuest(tmp_path, machine, accelerator, MEMORY_BYTES, vcpus) as qemu,
            our_guest(workload, "kvm", qemu) as ours,
        ):
            qemu.capabilities("events", "postcopy-ram", "postcopy-blocktime")
            ours.switch_on(Capability.POSTCOPY_RAM)
            if when == "after a round":
                # At this pace the guest writes faster than it is sent.
                ours.migration.set_parameters({"downtime-limit": 0, "max-bandwidth": 100 * MIB})
            ours.migration.migrate(qemu.listen(address(way, tmp_path)))
            if when == "after a round":
                wait_until(lambda: ours.events.count("MIGRATION_PASS") > 1, 20, "no second round")
            ours.migration.start_postcopy()
            assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
            check_arrived(qemu, workload, ours)
            assert "postcopy-active" in ours.events
            between = ["postcopy-device"] if qemu.version >= (10, 2) else []
            assert qemu.statuses() == ["setup", "active", *between, "postcopy-active", "completed"]
            info = qemu("query-migrate")
            assert len(info["postcopy-vcpu-blocktime"]) == vcpus
            assert info["postcopy-blocktime"] >= 0


def deltas(migration):
    cache = migration.info().xbzrle_cache
    return 0 if cache is None else cache.pages


@pytest.mark.proves(Way.TO, Feature.XBZRLE)
def test_pages_that_are_sent_again_go_as_deltas(tmp_path):
    workload = hammer(1)
    with (
        QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES, 1) as qemu,
        our_guest(workload, "kvm", qemu) as ours,
    ):
        ours.switch_on(Capability.XBZRLE)
        ours.migration.set_parameters({"downtime-limit": 0, "max-bandwidth": 40 * MIB})
        ours.migration.migrate(qemu.listen(f"unix:{tmp_path / 'migration'}"))
        wait_until(lambda: deltas(ours.migration) > 100, 30, "no deltas")
        ours.migration.set_parameters({"downtime-limit": 2000, "max-bandwidth": 0})
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        check_arrived(qemu, workload, ours)
