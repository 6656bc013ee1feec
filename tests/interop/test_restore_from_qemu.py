"""An image that a real QEMU has written wakes in our machine, lazily."""

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from interop.arrival import check_goes_on, check_memory, iterations, send_to_qemu
from interop.our_guest import TIMEOUT_S, OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.restore_options import RestoreOptions
from postcopy.status import Status

pytestmark = [pytest.mark.qemu(*ALL), pytest.mark.proves(Way.FROM, Feature.LAZY)]
STREAM = pytest.param("stream", marks=pytest.mark.proves(Way.FROM, Feature.SAVED))
MAPPED = pytest.param("mapped-ram", marks=pytest.mark.proves(Way.FROM, Feature.MAPPED))
TCG = pytest.param("tcg", 1, marks=pytest.mark.proves(Way.FROM, Feature.TCG))

MEMORY_BYTES = 32 * MIB


@pytest.mark.parametrize("form", [MAPPED, STREAM])
@pytest.mark.parametrize(("accelerator", "vcpus"), [("kvm", 1), ("kvm", 2), TCG])
def test_an_image_of_qemu_wakes_lazily(tmp_path, accelerator, vcpus, form):
    need("kvm")
    workload = workloads.load("hammer", MEMORY_BYTES, vcpus, hot_bytes=8 * MIB)
    image = tmp_path / "image"
    with QemuGuest(tmp_path, "microvm", accelerator, MEMORY_BYTES, vcpus) as qemu:
        send_to_qemu(workload, qemu)
        if form == "mapped-ram":
            qemu.capabilities("mapped-ram")
        qemu.parameters(max_bandwidth=1 << 40)
        qemu.save(image)
        slept_at = iterations(qemu.read_memory, workload)
    with OurGuest.waiting(workload, "kvm") as ours:
        ours.migration.set_parameters({"max-postcopy-bandwidth": 64 << 10})
        ours.migration.restore(RestoreOptions(str(image), lazy=True), exit_on_error=False)
        ours.migration.progress.wait(
            Status.POSTCOPY_ACTIVE, Status.COMPLETED, Status.FAILED, timeout=TIMEOUT_S
        )
        assert ours.migration.progress.status is Status.POSTCOPY_ACTIVE, ours.error
        check_goes_on(ours.machine.read_memory, workload, slept_at)
        assert ours.migration.info().measured.demand_faults > 0
        ours.migration.set_parameters({"max-postcopy-bandwidth": 0})
        assert ours.wait_end() is Status.COMPLETED, ours.error
        ours.machine.stop()
        check_memory(ours.machine.read_memory, workload)
