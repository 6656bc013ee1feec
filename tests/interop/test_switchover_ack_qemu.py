"""``switchover-ack`` with real QEMUs, in the form that it had before 11.1 and in that of 11.1."""

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import NEWEST, USUAL
from interop.arrival import check_arrived, check_back, send_to_qemu
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu(USUAL, NEWEST)

TO = pytest.mark.proves(Way.TO, Feature.SWITCHOVER_ACK)
FROM = pytest.mark.proves(Way.FROM, Feature.SWITCHOVER_ACK)
MEMORY_BYTES = 32 * MIB
WANTED = (Capability.RETURN_PATH, Capability.SWITCHOVER_ACK)
LEGACY = ("-global", "migration.switchover-ack-legacy=on")
"""What the machine types of 11.0 and older say to QEMU 11.1."""
both_ways = pytest.mark.parametrize(
    "more", [(), (Capability.POSTCOPY_RAM,)], ids=["precopy", "postcopy"]
)


def hammer():
    need("kvm")
    return workloads.load("hammer", MEMORY_BYTES, 1, hot_bytes=8 * MIB)


def a_qemu(folder, version, *, legacy):
    """``legacy``: it works as those before 11.1, of which 10.0 is one."""
    said = LEGACY if legacy and version == NEWEST else ()
    return QemuGuest(folder, "microvm", "kvm", MEMORY_BYTES, 1, said)


def set_up(ours, qemu, more, *, legacy):
    qemu.capabilities(*WANTED, *more)
    ours.switch_on(*WANTED, *more)
    ours.migration.set_parameters({"x-switchover-ack-legacy": legacy})


@TO
@both_ways
@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "of 11.1"])
def test_to_qemu(tmp_path, qemu_version, more, legacy):
    workload = hammer()
    with (
        a_qemu(tmp_path, qemu_version, legacy=legacy) as qemu,
        OurGuest.running(workload, "kvm") as ours,
    ):
        set_up(ours, qemu, more, legacy=legacy)
        if more:
            ours.send_by_postcopy(qemu.listen("tcp:127.0.0.1:0"))
        else:
            ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0"))
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        check_arrived(qemu, workload, ours)


def bring_back(folder, version, more, *, legacy):
    workload = hammer()
    with (
        a_qemu(folder, version, legacy=legacy) as qemu,
        OurGuest.waiting(workload, "kvm") as ours,
    ):
        send_to_qemu(workload, qemu)
        set_up(ours, qemu, more, legacy=legacy)
        uri = ours.listen("tcp:127.0.0.1:0")
        if more:
            qemu.send_by_postcopy(uri)
        else:
            qemu.parameters(max_bandwidth=1 << 40)
            qemu("migrate", uri=uri)
        check_back(ours, workload, qemu)


@FROM
@both_ways
def test_back_from_qemu_which_waits_for_our_word(tmp_path, qemu_version, more):
    bring_back(tmp_path, qemu_version, more, legacy=True)


@FROM
@both_ways
@pytest.mark.qemu(NEWEST)
def test_back_from_qemu_which_breaks_at_an_unasked_word(tmp_path, qemu_version, more):
    bring_back(tmp_path, qemu_version, more, legacy=False)


def refuse(folder, version, wanted):
    with (
        a_qemu(folder, version, legacy=False) as qemu,
        OurGuest.running(hammer(), "kvm") as ours,
    ):
        ours.switch_on(*WANTED)
        ours.migration.set_parameters({"x-switchover-ack-legacy": True})
        qemu.capabilities(*wanted)
        ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0"))
        assert ours.wait_end() is Status.FAILED
        assert ours.error == (
            "the destination does not acknowledge the switchover as QEMU did before 11.1; switch "
            "switchover-ack and x-switchover-ack-legacy on there too, or the latter off here"
        )
        assert ours.machine.running
        assert "active" not in ours.events


@TO
def test_where_it_is_off_no_page_is_sent(tmp_path, qemu_version):
    refuse(tmp_path, qemu_version, WANTED[:1])


@TO
@pytest.mark.qemu(NEWEST)
def test_where_it_is_that_of_11_1_no_page_is_sent(tmp_path, qemu_version):
    refuse(tmp_path, qemu_version, WANTED)
