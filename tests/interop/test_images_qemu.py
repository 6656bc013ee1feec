"""Images and a real QEMU: those it writes are read, those we take of it are right, and it reads ours."""

import json

import numpy as np
import pytest

from fakes.commands import postcopy
from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.real_qemu import MICROVM, QemuProcess, RealQemu, bios
from postcopy.channel.whole_file import WholeFile
from postcopy.image.convert import write_mapped
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest
from postcopy.image.verify import find_damages

pytestmark = pytest.mark.qemu(*ALL)
STREAM = pytest.param("stream", marks=pytest.mark.proves(Way.FROM, Feature.IMAGES))
MAPPED = pytest.param("mapped-ram", marks=pytest.mark.proves(Way.FROM, Feature.MAPPED))

RAM_BYTES = 32 << 20
LOADED_AT = 1 << 20
PAGE = 4096


def contents(pages: int, seed: int = 4) -> np.ndarray:
    rows = np.random.default_rng(seed).integers(0, 256, (pages, PAGE), dtype=np.uint8)
    rows[np.random.default_rng(seed + 1).random(pages) < 0.4] = 0
    return rows


@pytest.fixture
def ram(tmp_path):
    path = tmp_path / "ram"
    contents(RAM_BYTES // PAGE).tofile(path)
    return path


@pytest.mark.parametrize("form", [STREAM, MAPPED])
def test_an_image_that_qemu_has_saved_is_read(tmp_path, ram, form):
    image_path = tmp_path / "image"
    with RealQemu("microvm", ram, tmp_path / "qemu") as qemu:
        if form == "mapped-ram":
            qemu.capabilities("mapped-ram")
        qemu.save(image_path)
    expected = contents(RAM_BYTES // PAGE)
    with open_image(image_path) as image:
        assert (image.format, image.machine_name) == (form, "microvm")
        blocks = {block.name: block.size_bytes for block in image.blocks}
        assert blocks["microvm.ram"] == RAM_BYTES
        np.testing.assert_array_equal(image.read("microvm.ram", 0, len(expected)), expected)
        np.testing.assert_array_equal(image.has_data("microvm.ram"), expected.any(axis=1))
        names = [device.name for device in image.devices]
        assert {"timer", "cpu_common", "cpu", "globalstate"} <= set(names)
    # A manifest can be made for it, and so it can be checked.
    assert postcopy("verify", "--adopt", str(image_path)).returncode == 0


@pytest.mark.proves(Way.FROM, Feature.TAKEN)
@pytest.mark.parametrize(
    ("options", "form"),
    [
        ([], "mapped-ram"),
        (["--format", "stream"], "stream"),
        (["--compress", "zstd"], "chunks"),
    ],
    ids=["mapped-ram", "stream", "chunks"],
)
def test_a_snapshot_of_a_real_qemu(tmp_path, options, form):
    loaded = contents(2048)
    loaded.tofile(tmp_path / "loaded")
    loader = f"loader,file={tmp_path / 'loaded'},addr={LOADED_AT:#x},force-raw=on"
    qmp = f"unix:{tmp_path / 'qmp'}"
    line = ["-accel", "tcg", "-M", MICROVM, "-m", "64M", *bios(tmp_path / "qemu")]
    line += ["-device", loader, "-qmp", f"{qmp},server=on,wait=off"]
    path = tmp_path / "image"
    with QemuProcess(tmp_path / "qemu", line) as qemu:
        outcome = postcopy("snapshot", "--json", "--from", qmp, str(path), *options)
        assert (outcome.returncode, outcome.stderr) == (0, "")
        states = qemu("query-migrate-capabilities")
        assert [each["capability"] for each in states if each["state"]] == []
        assert qemu("query-status")["status"] == "running"
    result = json.loads(outcome.stdout.splitlines()[-1])
    assert result["format"] == form
    assert result["pause_us"] is not None  # QEMU tells that, in milliseconds, and no more
    assert result["longest_stall_us"] is None
    assert list(find_damages(path, Manifest.load(path))) == []
    with open_image(path) as image:
        assert image.format == form
        rows = image.read("microvm.ram", LOADED_AT // PAGE, len(loaded))
        np.testing.assert_array_equal(rows, loaded)


def test_a_qemu_that_has_not_run_yet_is_left_alone(tmp_path):
    # QEMU 10 would end itself: "invalid runstate transition: 'prelaunch' -> 'paused'".
    qmp = f"unix:{tmp_path / 'qmp'}"
    line = ["-S", "-accel", "tcg", "-M", MICROVM, "-m", "64M", *bios(tmp_path / "qemu")]
    with QemuProcess(tmp_path / "qemu", [*line, "-qmp", f"{qmp},server=on,wait=off"]) as qemu:
        outcome = postcopy("snapshot", "--from", qmp, str(tmp_path / "image"))
        assert outcome.returncode == 3
        assert "the machine is prelaunch" in outcome.stderr
        assert qemu("query-status")["status"] == "prelaunch"


@pytest.mark.proves(Way.TO, Feature.MAPPED)
def test_qemu_reads_an_image_that_was_written_anew(tmp_path, ram):
    with RealQemu("microvm", ram, tmp_path / "qemu") as qemu:
        qemu.save(tmp_path / "stream")
    with open_image(tmp_path / "stream") as image, WholeFile(tmp_path / "mapped") as file:
        write_mapped(image, file)
        file.publish()
    empty = tmp_path / "empty"
    with empty.open("wb") as file:
        file.truncate(RAM_BYTES)
    with RealQemu("microvm", empty, tmp_path / "other", "-incoming", "defer") as qemu:
        qemu.capabilities("mapped-ram")
        qemu("migrate-incoming", uri=f"file:{tmp_path / 'mapped'}")
        qemu.wait_migration("completed")
        dump = tmp_path / "dump"
        # Below, the firmware covers some of it.
        qemu("pmemsave", val=1 << 20, size=RAM_BYTES - (1 << 20), filename=str(dump))
        assert dump.read_bytes() == ram.read_bytes()[1 << 20 :]


@pytest.mark.proves(Way.FROM, Feature.MAPPED)
def test_a_mapped_background_snapshot_that_qemu_loses_is_never_taken_for_zeros(tmp_path):
    line = ["-accel", "tcg", "-M", MICROVM, "-m", "64M", *bios(tmp_path / "qemu")]
    path = tmp_path / "image"
    with QemuProcess(tmp_path / "qemu", line) as qemu:
        qemu.capabilities("background-snapshot", "mapped-ram")
        qemu.save(path)
    outcome = postcopy("inspect", str(path))
    # A QEMU that has mended it writes a last section, and then the image is as good as any.
    assert outcome.returncode == 0 or "the bitmaps were never written" in outcome.stderr
