"""A running QEMU migrates into an image: each page, each device, whatever way the pages come."""

import errno
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.real_qemu import MICROVM, QemuProcess, bios
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
from postcopy.receive.page_file import PageFile
from postcopy.receive.receiver import ReceivedImage
from postcopy.restore_options import RestoreOptions
from postcopy.status import Status

MEMORY_BYTES = 16 * MIB
PC_BYTES = 64 * MIB
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


def memory_of(qemu: QemuProcess, folder: Path, size: int, start: int = 0) -> np.ndarray:
    """The guest's memory up to ``size``, by QMP."""
    path = folder / "memory"
    qemu("pmemsave", val=start, size=size - start, filename=str(path))
    return np.fromfile(path, np.uint8).reshape(-1, PAGE)


def check_image(path: Path, block: str, memory: np.ndarray, first: int = 0) -> None:
    """It has this memory from a page on, no page of zeros there, and agrees with its manifest."""
    assert list(find_damages(path, Manifest.load(path))) == []
    with open_image(path) as image:
        assert (image.read(block, first, len(memory)) == memory).all()
        np.testing.assert_array_equal(image.has_data(block)[first:], memory.any(axis=1))
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


@pytest.mark.qemu("10.0", "11.1")
@pytest.mark.proves(Way.FROM, Feature.RECEIVED)
def test_a_pc_arrives_and_goes_back_to_qemu(tmp_path):
    """A q35 with devices, a firmware, and pages that its devices write: QEMU loads the image."""
    chance = np.random.default_rng(5)
    loaded = chance.integers(0, 256, (1024, PAGE), dtype=np.uint8)
    loaded.tofile(tmp_path / "loaded")
    line = ["-M", "q35", "-accel", "tcg", "-m", f"{PC_BYTES // MIB}M", "-vga", "std"]
    line += ["-device", "virtio-rng-pci", "-device", "e1000e,romfile=", "-S"]
    loader = ["-device", f"loader,file={tmp_path / 'loaded'},addr=0x200000,force-raw=on"]
    image = tmp_path / "image"
    with QemuProcess(tmp_path / "source", [*line, *loader]) as source:
        how = multifd(4, "zstd", None, "return-path")
        received, _ = receive(source, how, f"unix:{tmp_path / 'm'}", image)
        memory = memory_of(source, tmp_path, PC_BYTES, MIB)  # below, other memory is in between
    assert (memory[256 : 256 + 1024] == loaded).all()
    check_image(image, "pc.ram", memory, MIB // PAGE)
    assert received.machine.startswith("pc-q35-")
    with QemuProcess(tmp_path / "target", [*line, "-incoming", "defer"]) as target:
        target.capabilities("mapped-ram")
        target("migrate-incoming", uri=f"file:{image}")
        target.wait_migration("completed")
        assert (memory_of(target, tmp_path, PC_BYTES, MIB) == memory).all()


@pytest.mark.qemu(*ALL)
def test_the_guest_stays_where_it_is_if_the_image_fails(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "image")

    line = ["-accel", "tcg", "-M", MICROVM, "-m", "16M", *bios(tmp_path / "qemu")]
    with QemuProcess(tmp_path / "qemu", line) as qemu:
        qemu.capabilities("return-path")
        for attribute in ("clear", "finish"):  # in the middle, and at the very end
            with Receiving(f"unix:{tmp_path / 'm'}", tmp_path / "image") as receiving:
                with monkeypatch.context() as broken:
                    broken.setattr(PageFile, attribute, full)
                    qemu("migrate", uri=receiving.uri)
                    with pytest.raises(OSError, match="No space left"):
                        receiving.result()
                qemu.wait_migration("failed")
                wait_until(
                    lambda: qemu("query-status")["status"] == "running", TIMEOUT_S, "running"
                )
        assert [each.name for each in tmp_path.iterdir()] == ["qemu"]
