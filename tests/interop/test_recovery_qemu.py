"""The link to a real QEMU breaks after the switchover, and both go on."""

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.waiting import wait_until
from faults.fault_channel import FaultChannel
from interop.arrival import check_arrived
from interop.our_guest import TIMEOUT_S, OurGuest
from interop.qemu_guest import QemuGuest
from interop.test_from_qemu import check_back, send_to_qemu
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu(*ALL)

MEMORY_BYTES = 32 * MIB
SLOW = 1 * MIB


def hammer():
    need("kvm")
    return workloads.load("hammer", MEMORY_BYTES, hot_bytes=8 * MIB)


@pytest.fixture
def channels(tmp_path):
    """``channels(target)``: another fault channel in front of it."""
    made = []

    def make(target):
        made.append(FaultChannel(f"unix:{tmp_path}/channel-{len(made)}", target))
        return made[-1]

    yield make
    for channel in made:
        channel.close()


@pytest.mark.proves(Way.TO, Feature.RECOVERY)
@pytest.mark.parametrize(("machine", "accelerator"), [("microvm", "kvm"), ("none", "tcg")])
def test_our_guest_goes_on_at_qemu(tmp_path, channels, machine, accelerator):
    workload = hammer()
    with (
        QemuGuest(tmp_path, machine, accelerator, MEMORY_BYTES) as qemu,
        OurGuest.running(workload, "kvm", machine_type=machine) as ours,
    ):
        qemu.capabilities("events", "postcopy-ram")
        ours.switch_on(Capability.POSTCOPY_RAM)
        ours.migration.set_parameters({"max-postcopy-bandwidth": SLOW, "downtime-limit": 0})
        channel = channels(qemu.listen(f"unix:{tmp_path}/first"))
        ours.migration.migrate(channel.uri)
        ours.migration.start_postcopy()
        for turn in range(3):
            ours.migration.progress.wait(Status.POSTCOPY_ACTIVE, timeout=TIMEOUT_S)
            qemu.wait_migration("postcopy-active")
            wait_until(lambda: ours.migration.info().ram.postcopy_requests > 0, TIMEOUT_S)
            if turn == 2:
                break
            channel.break_all()
            ours.migration.progress.wait(Status.POSTCOPY_PAUSED, timeout=TIMEOUT_S)
            qemu.wait_migration("postcopy-paused")
            again = f"unix:{tmp_path}/again-{turn}"
            qemu("migrate-recover", uri=again)
            channel = channels(again)
            ours.migration.migrate(channel.uri, resume=True)
        ours.migration.set_parameters({"max-postcopy-bandwidth": 0})
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        check_arrived(qemu, workload, ours)
        assert ours.events.count("postcopy-recover-setup") == 2
        assert qemu.event_names().count("postcopy-recover") == 2


@pytest.mark.proves(Way.FROM, Feature.RECOVERY)
@pytest.mark.parametrize("what", ["link", "engine"])
def test_qemus_guest_goes_on_with_us(tmp_path, channels, what):
    """Another engine of ours has never heard of the firmware that QEMU asks about."""
    workload = hammer()
    with (
        QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES) as qemu,
        OurGuest.waiting(workload, "kvm") as ours,
    ):
        send_to_qemu(workload, qemu)
        qemu.capabilities("events", "postcopy-ram")
        ours.switch_on(Capability.POSTCOPY_RAM)
        channel = channels(ours.listen(f"unix:{tmp_path}/first"))
        qemu.send_by_postcopy(channel.uri, max_postcopy_bandwidth=SLOW)
        qemu.wait_migration("postcopy-active")
        ours.migration.progress.wait(Status.POSTCOPY_ACTIVE, timeout=TIMEOUT_S)
        if what == "engine":
            ours.migration._engine.kill()
        channel.break_all()
        ours.migration.progress.wait(Status.POSTCOPY_PAUSED, timeout=TIMEOUT_S)
        qemu.wait_migration("postcopy-paused")
        again = f"unix:{tmp_path}/again"
        ours.migration.recover(again)
        qemu.parameters(max_postcopy_bandwidth=0)
        qemu("migrate", uri=channels(again).uri, resume=True)
        ours.migration.progress.wait(Status.COMPLETED, timeout=TIMEOUT_S)
        check_back(ours, workload, qemu)
        assert "postcopy-recover" in ours.events
