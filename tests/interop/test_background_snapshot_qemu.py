"""Background snapshots of a real QEMU and of ours: each loads the other's, and both tell the same."""

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.snapshots import Portrait
from interop.arrival import check_memory, iterations, wait_until_beyond
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, wait_for_progress
from postcopy.errors import Refused
from postcopy.machine import oracle
from postcopy.machine.workload import load
from postcopy.parameters import Capability

pytestmark = [pytest.mark.qemu(*ALL), pytest.mark.kvm]

WORKLOAD = load("hammer", 32 * MIB, 1, hot_bytes=8 * MIB)
TWO_CPUS = load("hammer", 32 * MIB, 2, hot_bytes=8 * MIB)


def load_in_qemu(folder, workload, image, *capabilities):
    """A QEMU that goes on from an image of ours."""
    qemu = QemuGuest(folder, "microvm", "kvm", workload.memory_bytes, workload.vcpus)
    try:
        qemu.capabilities("events", *capabilities)
        qemu.listen(qemu.loading(image))
        qemu.wait_migration("completed")
        wait_until_beyond(qemu.read_memory, workload, iterations(qemu.read_memory, workload))
    except BaseException:
        qemu.close()
        raise
    return qemu


@pytest.mark.proves(Way.TO, Feature.SNAPSHOT)
@pytest.mark.parametrize("workload", [WORKLOAD, TWO_CPUS], ids=["1 vCPU", "2 vCPUs"])
def test_qemu_goes_on_from_our_picture(tmp_path, workload):
    with Portrait(workload) as portrait:
        portrait.take(f"file:{tmp_path}/image")
        portrait.check_goes_on()
        with load_in_qemu(tmp_path / "qemu", workload, tmp_path / "image") as qemu:
            qemu("stop")
            check_memory(qemu.read_memory, workload)


@pytest.mark.proves(Way.TO, Feature.SNAPSHOT, Feature.MAPPED)
def test_qemu_goes_on_from_our_mapped_picture(tmp_path):
    with Portrait(WORKLOAD, capabilities=(Capability.MAPPED_RAM,)) as portrait:
        portrait.take(f"file:{tmp_path}/image")
        with load_in_qemu(tmp_path / "qemu", WORKLOAD, tmp_path / "image", "mapped-ram") as qemu:
            qemu("stop")
            check_memory(qemu.read_memory, WORKLOAD)


@pytest.mark.proves(Way.FROM, Feature.SNAPSHOT)
@pytest.mark.parametrize("workload", [WORKLOAD, TWO_CPUS], ids=["1 vCPU", "2 vCPUs"])
def test_ours_goes_on_from_qemus_picture(tmp_path, workload):
    """And QEMU tells the same events and figures as we do."""
    with Portrait(workload) as portrait:
        portrait.take(f"file:{tmp_path}/image")
        ours = portrait.side.control.info().to_qapi()
        with load_in_qemu(tmp_path / "qemu", workload, tmp_path / "image") as qemu:
            qemu.capabilities("background-snapshot")
            qemu.events.clear()
            theirs = qemu.save(tmp_path / "theirs")
            assert qemu.event_names() == portrait.side.story()[-5:]
            assert qemu("query-status")["status"] == portrait.machine.run_state.value == "running"
        # QEMU 11 tells of the rest in another place, and QEMU 7 of something that is no more.
        assert set(theirs) - set(ours) <= {"expected-downtime", "remaining"}
        assert set(theirs["ram"]) ^ set(ours["ram"]) <= {"remaining", "skipped"}
        other = portrait.load(f"file:{tmp_path}/theirs")
        found = oracle.verify(other.machine.read_memory, workload)
        assert found.ok, found
        other.machine.cont()
        wait_for_progress(other.machine, workload)


def test_the_same_is_refused(tmp_path):
    """After one another: QEMU's words, and ours."""
    with Portrait(WORKLOAD) as portrait, QemuGuest(tmp_path, "none", "kvm", 4 * MIB) as qemu:
        qemu.capabilities("background-snapshot")
        for capability in ("postcopy-ram", "return-path", "pause-before-switchover", "multifd"):
            with pytest.raises(Exception, match="Background-snapshot is not") as theirs:
                qemu.capabilities(capability)
            with pytest.raises(Refused) as ours:
                portrait.side.set((Capability(capability),))
            assert str(ours.value) == str(theirs.value)
