"""A running QEMU migrates into an image: each page, each device, whatever way the pages come."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.real_qemu import QemuProcess
from fakes.receiving import Receiving
from fakes.waiting import wait_until
from interop.arrival import check_goes_on, check_memory, iterations, send_to_qemu
from interop.our_guest import TIMEOUT_S, OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest
from postcopy.image.verify import find_damages
from postcopy.machine import workload as workloads
from postcopy.receive.receiver import ReceivedImage
from postcopy.restore_options import RestoreOptions
from postcopy.status import Status

MEMORY_BYTES = 16 * MIB
PAGE = 4096


class How(NamedTuple):
    """How the pages are sent."""

    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, object] = MappingProxyType({})
    channels: int = 0


def multifd(channels: int, compression: str = "none", zeros: str | None = None, *more: str) -> How:
    parameters = {"multifd-channels": channels, "multifd-compression": compression}
    if zeros is not None:
        parameters["zero-page-detection"] = zeros
    return How(("multifd", *more), parameters, channels)


WAYS = {
    "plain": How(),
    "answered": How(("return-path",)),
    "xbzrle": How(("xbzrle", "return-path")),
    "multifd": multifd(2),
    "zlib": multifd(16, "zlib", None, "return-path"),
    "zstd": multifd(3, "zstd"),
}
NEWER_WAYS = {
    "no zero pages": How((), {"zero-page-detection": "none"}),
    "multifd, no zero pages": multifd(1, "none", "none"),
    "multifd, zero pages on the main channel": multifd(4, "none", "legacy", "return-path"),
}
"""Before QEMU 9.0 there is no ``zero-page-detection``."""


def ways(qemu: QemuProcess) -> dict[str, How]:
    return WAYS if qemu.version < (9, 0) else WAYS | NEWER_WAYS


def again(info: dict, how: How) -> bool:
    """Whether pages have been sent again, as they are to be sent."""
    if info["status"] in ("completed", "failed"):
        return True
    if "xbzrle" in how.capabilities:
        return info.get("xbzrle-cache", {}).get("pages", 0) > 0
    return info.get("ram", {}).get("dirty-sync-count", 0) > 1


def migrate(qemu: QemuProcess, how: How, uri: str) -> dict:
    """Migrate in several rounds: the limits are lifted when the guest has written what was sent."""
    states = [{"capability": each, "state": True} for each in how.capabilities]
    if states:
        qemu("migrate-set-capabilities", capabilities=states)
    limits = {"max-bandwidth": 60 * MIB, "downtime-limit": 1}
    lifted = {"max-bandwidth": 1 << 40, "downtime-limit": 2000}
    qemu("migrate-set-parameters", **limits, **how.parameters)
    qemu("migrate", uri=uri)
    wait_until(lambda: again(qemu("query-migrate"), how), TIMEOUT_S, "no further round")
    qemu("migrate-set-parameters", **lifted)
    info = qemu.wait_migration("completed")
    for state in states:
        state["state"] = False
    qemu("migrate-set-capabilities", capabilities=states)
    return info


def receive(qemu: QemuProcess, how: How, uri: str, image: Path) -> tuple[ReceivedImage, dict]:
    """Receive it; return what has come, and what the QEMU says of it."""
    image.unlink(missing_ok=True)
    image.with_name(f"{image.name}.manifest.json").unlink(missing_ok=True)
    with Receiving(uri, image) as receiving:
        info = migrate(qemu, how, receiving.uri)
        return receiving.result(), info


def memory_of(qemu: QemuProcess, folder: Path, size: int) -> np.ndarray:
    """The guest's memory, by QMP."""
    path = folder / "memory"
    qemu("pmemsave", val=0, size=size, filename=str(path))
    return np.fromfile(path, np.uint8).reshape(-1, PAGE)


def check_image(path: Path, block: str, memory: np.ndarray) -> None:
    """It has this memory, no page of zeros in its file, and agrees with its manifest."""
    assert list(find_damages(path, Manifest.load(path))) == []
    with open_image(path) as image:
        np.testing.assert_array_equal(image.read(block, 0, len(memory)), memory)
        np.testing.assert_array_equal(image.has_data(block), memory.any(axis=1))
        names = {device.name for device in image.devices}
        assert {"timer", "cpu_common", "cpu", "globalstate"} <= names
        assert image.description is not None


@pytest.mark.qemu(*ALL)
@pytest.mark.proves(Way.FROM, Feature.RECEIVED)
def test_a_guest_that_writes_arrives_in_every_way_and_wakes(tmp_path):
    need("kvm")
    workload = workloads.load("hammer", MEMORY_BYTES, 1, hot_bytes=4 * MIB)
    with QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES) as qemu:
        send_to_qemu(workload, qemu)
        for number, (name, how) in enumerate(ways(qemu).items()):
            image = tmp_path / f"image{number}"
            uri = "tcp:127.0.0.1:0" if number % 2 else f"unix:{tmp_path / 'm'}"
            received, info = receive(qemu, how, uri, image)
            while name == "xbzrle" and not received.xbzrle_pages:  # a busy host: the guest slept
                qemu("cont")
                image = image.with_suffix(".again")
                received, info = receive(qemu, how, uri, image)
            check_image(image, "microvm.ram", memory_of(qemu, tmp_path, MEMORY_BYTES))
            assert received.channels == how.channels, name
            assert info["ram"]["dirty-sync-count"] > 1, name
            assert received.pages * PAGE >= received.data_bytes, name
            left_at = iterations(qemu.read_memory, workload)
            if number + 1 < len(ways(qemu)):
                qemu("cont")
    with OurGuest.waiting(workload, "kvm") as ours:
        ours.migration.restore(RestoreOptions(str(image), lazy=True), exit_on_error=False)
        assert ours.wait_end() is Status.COMPLETED, ours.error
        check_goes_on(ours.machine.read_memory, workload, left_at)
        ours.machine.stop()
        check_memory(ours.machine.read_memory, workload)
