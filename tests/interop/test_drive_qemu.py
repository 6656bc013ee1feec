"""A guest moves with its drive: to a real QEMU and back, at work all the time."""

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.waiting import wait_until
from interop.arrival import check_goes_on, check_memory, iterations
from interop.our_guest import TIMEOUT_S, OurGuest
from interop.qemu_guest import QemuGuest
from machine.drives import MEMORY_BYTES, check_disk, disk_workload, make_disk, writes_and_reads
from machine.machines import need
from postcopy.parameters import Capability
from postcopy.restore_options import RestoreOptions
from postcopy.status import Status

pytestmark = [pytest.mark.qemu(*ALL), pytest.mark.kvm]

HOW = pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
WHERE = pytest.mark.parametrize(
    "accelerator",
    ["kvm", pytest.param("tcg", marks=pytest.mark.proves(Way.FROM, Feature.TCG))],
)


def qemu_with_drive(folder, accelerator, path, vcpus=1):
    more = ["-global", "virtio-mmio.force-legacy=off", *drive_options(path)]
    return QemuGuest(folder, "microvm", accelerator, MEMORY_BYTES, vcpus, more)


def drive_options(path):
    block = f"driver=raw,node-name=d0,file.driver=file,file.filename={path}"
    return ["-blockdev", block, "-device", "virtio-blk-device,id=drive,drive=d0"]


def to_qemu(ours, qemu, *, postcopy):
    if postcopy:
        qemu.capabilities("postcopy-ram")
        ours.switch_on(Capability.POSTCOPY_RAM)
        ours.send_by_postcopy(qemu.listen("tcp:127.0.0.1:0"))
    else:
        ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0"))
    assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
    qemu.wait_migration("completed")
    assert ("postcopy-active" in ours.events) is postcopy
    assert not ours.machine.owned
    assert not ours.machine.running


def from_qemu(qemu, back, *, postcopy):
    if postcopy:
        qemu.capabilities("postcopy-ram")
        back.switch_on(Capability.POSTCOPY_RAM)
        qemu.send_by_postcopy(back.listen("tcp:127.0.0.1:0"))
    else:
        qemu.parameters(max_bandwidth=1 << 40)
        qemu("migrate", uri=back.listen("tcp:127.0.0.1:0"))
    assert back.wait_end() is Status.COMPLETED, (back.error, qemu.log)
    qemu.wait_migration("completed")
    assert ("postcopy-active" in back.events) is postcopy
    assert back.machine.owned


def back_from_qemu(qemu, back, workload, path, *, postcopy):
    """Memory and disk are right there, and when the guest has come back."""
    qemu("stop")
    check_memory(qemu.read_memory, workload)
    check_disk(qemu.read_memory, workload, path)
    qemu("cont")
    from_qemu(qemu, back, postcopy=postcopy)
    left_at = iterations(qemu.read_memory, workload)
    requests = writes_and_reads(qemu.read_memory, workload)
    check_works_on(back.machine.read_memory, workload, left_at, requests)
    back.machine.stop()
    check_memory(back.machine.read_memory, workload)
    check_disk(back.machine.read_memory, workload, path)


def check_works_on(read, workload, left_at, requests):
    """The guest has come further than it was, with its memory and with its drive."""
    check_goes_on(read, workload, left_at)

    def used() -> bool:
        return all(a > b for a, b in zip(writes_and_reads(read, workload), requests, strict=True))

    wait_until(used, 30, "the guest does not use its drive any more")


@pytest.mark.proves(Way.FROM, Feature.LAZY, Feature.SAVED)
def test_an_image_of_qemu_wakes_lazily_with_its_drive(tmp_path):
    need("kvm")
    path, image = make_disk(tmp_path / "disk"), tmp_path / "image"
    workload = disk_workload()
    with qemu_with_drive(tmp_path / "qemu", "kvm", path) as qemu:
        with OurGuest.running(workload, "kvm", drive=path) as ours:
            to_qemu(ours, qemu, postcopy=False)
        qemu.parameters(max_bandwidth=1 << 40)
        qemu.save(image)
        read = qemu.read_memory
        left_at, requests = iterations(read, workload), writes_and_reads(read, workload)
    with OurGuest.waiting(workload, "kvm", drive=path) as back:
        back.migration.set_parameters({"max-postcopy-bandwidth": 64 << 10})
        back.migration.restore(RestoreOptions(str(image), lazy=True), exit_on_error=False)
        back.migration.progress.wait(
            Status.POSTCOPY_ACTIVE, Status.COMPLETED, Status.FAILED, timeout=TIMEOUT_S
        )
        check_works_on(back.machine.read_memory, workload, left_at, requests)
        back.migration.set_parameters({"max-postcopy-bandwidth": 0})
        assert back.wait_end() is Status.COMPLETED, back.error
        back.machine.stop()
        check_memory(back.machine.read_memory, workload)
        check_disk(back.machine.read_memory, workload, path)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ([], "virtio-blk' 0. Make sure that your current VM setup"),
        (["-global", "virtio-mmio.force-legacy=on"], ""),
    ],
    ids=["none", "legacy"],
)
def test_a_qemu_without_such_a_drive_refuses_and_the_guest_runs_on(tmp_path, more, why):
    need("kvm")
    path = make_disk(tmp_path / "disk")
    workload = disk_workload()
    if more:
        more = [*more, *drive_options(path)]
    with (
        QemuGuest(tmp_path / "qemu", "microvm", "kvm", MEMORY_BYTES, 1, more) as qemu,
        OurGuest.running(workload, "kvm", drive=path) as ours,
    ):
        ours.switch_on(Capability.RETURN_PATH)
        ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0"))
        assert ours.wait_end() is Status.FAILED
        assert why in qemu.why_failed()
        read = ours.machine.read_memory
        check_works_on(read, workload, iterations(read, workload), writes_and_reads(read, workload))
        ours.machine.stop()
        check_memory(read, workload)
        check_disk(read, workload, path)


@pytest.mark.proves(Way.TO, Feature.DRIVE)
@pytest.mark.proves(Way.FROM, Feature.DRIVE)
@WHERE
@HOW
@pytest.mark.parametrize("vcpus", [1, 2])
def test_to_qemu_and_back(tmp_path, accelerator, postcopy, vcpus):
    need("kvm")
    path = make_disk(tmp_path / "disk")
    workload = disk_workload(vcpus=vcpus, delay_cycles=0)
    with (
        qemu_with_drive(tmp_path / "qemu", accelerator, path, vcpus) as qemu,
        OurGuest.waiting(workload, "kvm", drive=path) as back,
    ):
        with OurGuest.running(workload, "kvm", drive=path) as ours:
            to_qemu(ours, qemu, postcopy=postcopy)
            read = ours.machine.read_memory
            left_at, requests = iterations(read, workload), writes_and_reads(read, workload)
        check_works_on(qemu.read_memory, workload, left_at, requests)
        back_from_qemu(qemu, back, workload, path, postcopy=postcopy)
