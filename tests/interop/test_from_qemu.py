"""A guest of ours comes back from a real QEMU, where it has been running."""

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.waiting import wait_until
from interop.arrival import check_back, send_to_qemu
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability

pytestmark = pytest.mark.qemu(*ALL)

MEMORY_BYTES = 32 * MIB
HOT_BYTES = 8 * MIB
KVM = pytest.mark.proves(Way.FROM, Feature.KVM)
TCG = pytest.mark.proves(Way.FROM, Feature.TCG)
TCP = pytest.mark.proves(Way.FROM, Feature.TCP)
UNIX = pytest.mark.proves(Way.FROM, Feature.UNIX)


@pytest.mark.parametrize(
    ("accelerator", "vcpus", "way"),
    [
        pytest.param("kvm", 1, "unix", marks=[KVM, UNIX]),
        pytest.param("kvm", 2, "tcp", marks=[KVM, TCP]),
        pytest.param("tcg", 1, "tcp", marks=[TCG, TCP]),
        pytest.param("tcg", 2, "unix", marks=[TCG, UNIX]),
    ],
)
class TestBackFromQemu:
    @pytest.mark.proves(Way.FROM, Feature.PRECOPY)
    def test_by_precopy(self, tmp_path, accelerator, vcpus, way):
        need("kvm")
        workload = workloads.load("hammer", MEMORY_BYTES, vcpus, hot_bytes=HOT_BYTES)
        with (
            QemuGuest(tmp_path, "microvm", accelerator, MEMORY_BYTES, vcpus) as qemu,
            OurGuest.waiting(workload, "kvm") as ours,
        ):
            send_to_qemu(workload, qemu)
            qemu.parameters(max_bandwidth=1 << 40)
            where = f"unix:{tmp_path / 'back'}" if way == "unix" else "tcp:127.0.0.1:0"
            qemu("migrate", uri=ours.listen(where))
            check_back(ours, workload, qemu)

    @pytest.mark.proves(Way.FROM, Feature.POSTCOPY, Feature.BLOCKTIME)
    @pytest.mark.parametrize("when", ["at once", "after a round"])
    def test_by_postcopy(self, tmp_path, accelerator, vcpus, way, when):
        need("kvm")
        workload = workloads.load("hammer", MEMORY_BYTES, vcpus, hot_bytes=HOT_BYTES)
        with (
            QemuGuest(tmp_path, "microvm", accelerator, MEMORY_BYTES, vcpus) as qemu,
            OurGuest.waiting(workload, "kvm") as ours,
        ):
            send_to_qemu(workload, qemu)
            qemu.capabilities("postcopy-ram")
            ours.switch_on(Capability.POSTCOPY_RAM, Capability.POSTCOPY_BLOCKTIME)
            uri = ours.listen(f"unix:{tmp_path / 'back'}" if way == "unix" else "tcp:127.0.0.1:0")
            if when == "after a round":
                # QEMU takes a limit of 0 for "now"; with this one it could never send the hot set.
                qemu.parameters(max_bandwidth=40 * MIB, downtime_limit=1)
                qemu("migrate", uri=uri)
                wait_until(lambda: rounds(qemu) > 1, 20, "no second round")
                qemu("migrate-start-postcopy")
            else:
                qemu.send_by_postcopy(uri)
            check_back(ours, workload, qemu)
            assert "postcopy-active" in ours.events
            info = ours.migration.info()
            assert len(info.postcopy_vcpu_blocktime_ms) == vcpus


@pytest.mark.proves(Way.FROM, Feature.XBZRLE)
def test_pages_that_are_sent_again_come_as_deltas(tmp_path):
    need("kvm")
    workload = workloads.load("hammer", MEMORY_BYTES, 1, hot_bytes=HOT_BYTES)
    with (
        QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES, 1) as qemu,
        OurGuest.waiting(workload, "kvm") as ours,
    ):
        send_to_qemu(workload, qemu)
        qemu.capabilities("xbzrle")
        qemu.parameters(max_bandwidth=40 * MIB, downtime_limit=1)
        qemu("migrate", uri=ours.listen(f"unix:{tmp_path / 'back'}"))
        wait_until(lambda: deltas(qemu) > 100, 30, "no deltas")
        qemu.parameters(max_bandwidth=1 << 40, downtime_limit=2000)
        check_back(ours, workload, qemu)


def deltas(qemu):
    return qemu("query-migrate").get("xbzrle-cache", {}).get("pages", 0)


def rounds(qemu):
    return qemu("query-migrate").get("ram", {}).get("dirty-sync-count", 0)
