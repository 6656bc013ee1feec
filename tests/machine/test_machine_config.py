"""What cannot be is refused in one line, before anything is made."""

import os
import re

import pytest

from machine.machines import MIB
from postcopy.errors import HostCannot, Refused
from postcopy.machine.config import MachineConfig, read_image
from postcopy.machine.memory_blocks import MemoryBlock, check_host

CODE = b"\xeb\xfe"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"memory_bytes": 3 * MIB}, "not a multiple of 2 MiB"),
        ({"memory_bytes": 0}, "not a multiple of 2 MiB"),
        ({"memory_bytes": 65538 * MIB}, "65538 MiB is too much for a machine; 65536 MiB do"),
        ({"vcpus": 0}, "0 vCPUs cannot be; give 1 to 64"),
        ({"vcpus": 65}, "65 vCPUs cannot be"),
        ({"privilege": 1}, "privilege 1 cannot be"),
        ({"accel": "tcg"}, "no accelerator is called 'tcg'"),
        ({"machine_type": "pc"}, "no machine is called 'pc'; give microvm or none"),
        ({"image": b""}, "the image is empty"),
        ({"load_address": 0x6000}, "would lie on the page tables; load it at 0x7000"),
        (
            {"memory_bytes": 5120 * MIB, "image": bytes(MIB)},
            "would lie on the page tables; load it at 0x101000",
        ),
        ({"image": bytes(2 * MIB)}, "does not fit into 2 MiB of memory"),
        ({"entry": 0x20000}, "entry 0x20000 is outside the image"),
    ],
)
def test_refusals(settings, why):
    config = MachineConfig(**({"memory_bytes": 2 * MIB, "image": CODE} | settings))
    with pytest.raises(Refused, match=why) as refusal:
        config.check()
    assert "\n" not in str(refusal.value)
    assert ";" in str(refusal.value)


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ([("a", 4)], "the RAM blocks have 4194304 bytes together, and the memory 8388608"),
        ([("a", 4), ("a", 4)], "RAM block 'a' is given twice"),
        ([("", 8)], "RAM block '' cannot have this name; give 1 to 255"),
        ([("a" * 256, 8)], "cannot have this name"),
        ([("pc.bios", 8)], "RAM block 'pc.bios' has the name of QEMU's firmware"),
        ([("a", 8, 65536)], "RAM block 'a' cannot have pages of 65536 bytes; give 4K, 2M or 1G"),
        ([("a", 7), ("b", 1)], "RAM block 'a' of 7340032 bytes is not a multiple of 2M"),
        ([("a", 8, 1 << 30)], "RAM block 'a' of 8388608 bytes is not a multiple of 1G"),
    ],
)
def test_blocks_that_cannot_be(blocks, why):
    made = tuple(MemoryBlock(name, mib * MIB, *more) for name, mib, *more in blocks)
    with pytest.raises(Refused, match=why) as refusal:
        MachineConfig(8 * MIB, blocks=made).check()
    assert ";" in str(refusal.value)


def test_a_block_begins_at_a_multiple_of_its_page_size():
    small, large = MemoryBlock("small", 2 * MIB), MemoryBlock("large", 1 << 30, 1 << 30)
    total = (1 << 30) + 2 * MIB
    MachineConfig(total, blocks=(large, small)).check()
    with pytest.raises(
        Refused, match=r"'large' would begin at guest address 0x200000, .* 1G; name it"
    ):
        MachineConfig(total, blocks=(small, large)).check()


def test_pages_of_a_gibibyte_are_warned_of():
    assert MemoryBlock("a", 1 << 30, 2 * MIB).warning is None
    warning = MemoryBlock("a", 1 << 30, 1 << 30).warning
    assert "stands still for 0.9 s at 10 Gbit/s, 8.6 s at 1 Gbit/s" in str(warning)


class TestMemoryPaths:
    def test_pages_are_those_of_the_file_system(self):
        assert MemoryBlock.of("a", MIB, None, "/dev/shm").page_size_bytes == 4096
        with pytest.raises(
            Refused, match="page size 2M, and the files in /dev/shm have pages of 4K"
        ):
            MemoryBlock.of("a", MIB, 2 * MIB, "/dev/shm")

    @pytest.mark.parametrize(
        ("path", "why"),
        [
            (
                "/proc",
                "the memory path /proc is in a file system 'proc'; give a directory in a tmpfs",
            ),
            (
                "/nowhere",
                "the memory path /nowhere cannot be used: No such file or directory; give",
            ),
        ],
    )
    def test_other_files_are_no_memory(self, path, why):
        with pytest.raises(Refused, match=why):
            MemoryBlock.of("a", MIB, None, path)

    def test_too_little_room_is_told_with_what_is_missing(self):
        """Over all blocks that lie there."""
        now = os.statvfs("/dev/shm")
        free = now.f_bavail * now.f_frsize // MIB
        blocks = [MemoryBlock(name, free * MIB, directory="/dev/shm") for name in "ab"]
        with pytest.raises(
            HostCannot, match=f"{2 * free} MiB there: .* MiB are missing"
        ) as refused:
            check_host(blocks)
        assert refused.value.cure.startswith("mount -o remount,size=")
        assert refused.value.cure.endswith(" /dev/shm")


def test_too_few_huge_pages_are_told_over_all_blocks():
    blocks = [MemoryBlock(name, 1 << 40, 2 * MIB) for name in "ab"]
    with pytest.raises(
        HostCannot, match=r"2048 KiB: 1048576 are needed, .* are missing"
    ) as refused:
        check_host(blocks)
    assert re.fullmatch(r"echo \d+ > /sys/.*-2048kB/nr_hugepages", refused.value.cure)


def test_what_is_allowed():
    MachineConfig(2 * MIB, vcpus=64, image=CODE).check()
    MachineConfig(4096 * MIB, image=bytes(2 * MIB)).check()
    MachineConfig(65536 * MIB).check()


def test_reading_an_image(tmp_path):
    path = tmp_path / "image"
    with pytest.raises(Refused, match="cannot be read: No such file"):
        read_image(path)
    path.write_bytes(CODE)
    assert read_image(path) == CODE
