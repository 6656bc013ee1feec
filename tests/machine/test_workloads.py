"""The workloads' binaries are what their sources say, and parameters that cannot be are refused."""

import shutil
import subprocess
from importlib import resources

import pytest

from machine.machines import MIB
from postcopy.errors import Refused
from postcopy.machine import workload


def test_binaries_are_built_from_their_sources(tmp_path):
    for tool in ("make", "as", "ld"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}: install binutils and make")
    source = resources.files("postcopy.machine") / "workloads"
    for file in source.iterdir():
        if not file.name.endswith(".bin"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    subprocess.run(["make", "-s", "-C", str(tmp_path)], check=True, timeout=60)
    for name in workload.NAMES:
        built = (tmp_path / f"{name}.bin").read_bytes()
        kept = (source / f"{name}.bin").read_bytes()
        assert built == kept, f"run make in the directory of {name}.S"


def test_parameters_are_in_the_image():
    work = workload.load("sweep", 16 * MIB, 3)
    image = work.image()
    assert image[0x10:0x18] == b"sweep\0\0\0"
    assert image[0x40:0x48] == b"PCYWRK01"
    assert int.from_bytes(image[0x48:0x50], "little") == 3
    assert work.delay_cycles > 0
    assert work.pages <= 14 * MIB // 4096
    assert work.slice_address(2) == workload.BASE_ADDRESS + 2 * work.slice_bytes


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("walk", 16 * MIB), "no workload is called 'walk'"),
        (("hammer", 2 * MIB), "hammer cannot fill 0 bytes of 2 MiB"),
        (("idle", 2 * MIB + 4096, 2), "with 2 vCPUs"),
    ],
)
def test_refusals(arguments, why):
    with pytest.raises(Refused, match=why):
        workload.load(*arguments)


def test_more_fill_than_memory():
    with pytest.raises(Refused, match="leaves the first 2 MiB alone"):
        workload.load("hammer", 4 * MIB, fill_bytes=4 * MIB)
