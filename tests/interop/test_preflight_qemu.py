"""Whether a QEMU would load an image is known beforehand: each mismatch by name, and no false alarm."""

import asyncio
import json
import shlex

import pytest

from fakes.commands import one_line, postcopy
from fakes.qemu_versions import BINARY
from fakes.real_qemu import MICROVM, QemuProcess, bios
from postcopy.errors import Refused
from postcopy.image.formats import open_image
from postcopy.serve.preflight import preflight

COMMON = ["-accel", "tcg", "-display", "none", "-nodefaults"]
RNG, DISK = ["-device", "virtio-rng-pci"], ["-device", "virtio-blk-pci,drive=d"]
EMPTY = ["-blockdev", "driver=null-co,node-name=d,size=1048576,read-zeroes=on"]
BASE = [
    "-M",
    "q35",
    "-m",
    "64M",
    "-smp",
    "2",
    "-device",
    "VGA",
    *RNG,
    *EMPTY,
    *DISK,
    "-device",
    "e1000,romfile=",
]

OTHERS = {  # what is put in place of what, and what is said
    "less memory": ("64M", "32M", "RAM block pc.ram: another size (image: 67108864 bytes; QEMU: 33554432"),
    "more memory": ("64M", "128M", "RAM block pc.ram: another size"),
    "a pc": ("q35", "pc", "machine: another machine type (image: pc-q35-10.0; QEMU: pc-i440fx-10.0)"),
    "an older q35": ("q35", "pc-q35-9.0", "machine: another machine type"),
    "the oldest q35": ("q35", "pc-q35-3.1", "machine: another machine type"),
    "one CPU less": ("2", "1", "device cpu 1: QEMU has no such device"),
    "another VGA": ("VGA", "cirrus-vga", "device 0000:00:01.0/vga 0: QEMU has no such device"),
    "another screen": ("VGA", "bochs-display", "RAM block 0000:00:01.0/vga.vram: QEMU has no such block"),
    "a smaller screen": ("VGA", "VGA,vgamem_mb=8", "RAM block 0000:00:01.0/vga.vram: another size"),
    "a larger screen": ("VGA", "VGA,vgamem_mb=32", "RAM block 0000:00:01.0/vga.vram: another size"),
    "a screen elsewhere": ("VGA", "VGA,addr=0x9", "device 0000:00:01.0/vga 0: QEMU has no such device"),
    "no randomness": ("virtio-rng-pci", "virtio-balloon-pci", "/virtio-rng 0: QEMU has no such device"),
    "it elsewhere": ("virtio-rng-pci", "virtio-rng-pci,addr=0x8", "device 0000:00:02.0/virtio-rng 0: QEMU"),
    "a SCSI disk": ("virtio-blk-pci,drive=d", "virtio-scsi-pci", "device 0000:00:03.0/virtio-blk 0: QEMU"),
    "an IDE disk": ("virtio-blk-pci,drive=d", "ide-hd,drive=d", "/virtio-blk 0: QEMU has no such de"),
    "its disk elsewhere": ("virtio-blk-pci,drive=d", "virtio-blk-pci,drive=d,addr=7", "device 0000:00:03."),
    "another card": ("e1000,romfile=", "rtl8139,romfile=", "device 0000:00:04.0/e1000 0: QEMU has no such"),
    "a virtio card": ("e1000,romfile=", "virtio-net-pci,romfile=", "device 0000:00:04.0/e1000 0: QEMU has"),
    "a newer card": ("e1000,romfile=", "e1000e,romfile=", "device 0000:00:04.0/e1000 0: QEMU has no such"),
    "a card elsewhere": ("e1000,romfile=", "e1000,romfile=,addr=0x10", "device 0000:00:04.0/e1000 0: QEMU"),
    "no HPET": ("q35", "q35,hpet=off", "device hpet 0: QEMU has no such device"),
    "no PIT": ("q35", "q35,pit=off", "device i8254 0: QEMU has no such device"),
    "no SMBus": ("q35", "q35,smbus=off", "ich9_smb 0: QEMU has no such device"),
    "no SATA": ("q35", "q35,sata=off", "device 0000:00:1f.2/ich9_ahci 0: QEMU has no such device"),
    "no keyboard": ("q35", "q35,i8042=off", "device pckbd 0: QEMU has no such device"),
}  # fmt: skip

RIGHT = {
    "q35": ["-M", "q35", "-m", "64M"],
    "pc": ["-M", "pc", "-m", "64M"],
    "an older pc": ["-M", "pc-i440fx-8.0", "-m", "64M"],
    "three CPUs": ["-M", "q35", "-m", "64M", "-smp", "3"],
    "all of it": BASE,
    "network": ["-M", "pc", "-m", "64M", "-device", "virtio-net-pci,romfile=",
                "-device", "e1000e,romfile="],
    "USB": ["-M", "q35", "-m", "64M", "-device", "qemu-xhci", "-device", "usb-tablet"],
    "SCSI": ["-M", "q35", "-m", "64M", *EMPTY, "-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=d"],
    "IDE": ["-M", "pc", "-m", "64M", *EMPTY, "-device", "ide-hd,drive=d"],
    "serial": ["-M", "q35", "-m", "64M", "-serial", "null", "-device", "virtio-serial-pci"],
    "balloon": ["-M", "pc", "-m", "64M", "-device", "virtio-balloon-pci", "-vga", "std"],
    "bridges": ["-M", "q35", "-m", "64M", "-device", "pcie-root-port,id=p",
                "-device", "virtio-rng-pci,bus=p"],
    "memory": ["-M", "q35", "-m", "64M,slots=2,maxmem=1G", "-object", "memory-backend-ram,id=m,size=128M",
               "-device", "pc-dimm,memdev=m"],
    "vmgenid": ["-M", "q35", "-m", "64M", "-device", "vmgenid", "-device", "pvpanic"],
    "an older q35": ["-M", "pc-q35-6.2", "-m", "64M"],
    "a watchdog": ["-M", "q35", "-m", "64M", "-device", "i6300esb"],
    "an IOMMU": ["-M", "q35,kernel-irqchip=split", "-m", "64M", "-device", "intel-iommu"],
    "a virtio IOMMU": ["-M", "q35", "-m", "64M", "-device", "virtio-iommu-pci"],
    "EHCI": ["-M", "q35", "-m", "64M", "-device", "ich9-usb-ehci1"],
    "a second AHCI": ["-M", "q35", "-m", "64M", "-device", "ahci"],
    "megasas": ["-M", "pc", "-m", "64M", "-device", "megasas"],
    "LSI": ["-M", "pc", "-m", "64M", "-device", "lsi53c895a"],
    "a PCI bridge": ["-M", "pc", "-m", "64M", "-device", "pci-bridge,chassis_nr=1"],
    "SD": ["-M", "q35", "-m", "64M", "-device", "sdhci-pci"],
    "sound": ["-M", "pc", "-m", "64M", "-audiodev", "none,id=a",
              "-device", "intel-hda", "-device", "hda-duplex,audiodev=a"],
}  # fmt: skip


def command(words, folder):
    return shlex.join([BINARY, *words, *COMMON, *(bios(folder) if MICROVM in words else [])])


def saved(folder, words):
    """An image of a guest that has run; its firmware has done some work."""
    folder.mkdir(parents=True, exist_ok=True)
    with QemuProcess(folder, ["-accel", "tcg", *words]) as qemu:
        qemu.save(folder / "image")
    return folder / "image"


@pytest.fixture
def image(tmp_path_factory, qemu_version):
    """The same for all tests of a session."""
    folder = tmp_path_factory.getbasetemp() / f"preflight-{qemu_version}"
    return folder / "image" if folder.exists() else saved(folder, BASE)


def problems(path, line, *, lazy=False):
    checks = asyncio.run(preflight(path, line, lazy=lazy))
    return [f"{each.what}: {each.problem} (image: {each.image}; QEMU: {each.qemu})"
            for each in checks if each.problem is not None]  # fmt: skip


@pytest.mark.qemu
@pytest.mark.parametrize("other", OTHERS)
def test_each_mismatch_has_its_name(image, tmp_path, other):
    old, new, said = OTHERS[other]
    assert old in BASE
    line = command([new if word == old else word for word in BASE], tmp_path)
    found = problems(image, line)
    assert any(said in each for each in found), found


@pytest.mark.qemu
@pytest.mark.parametrize("machine", RIGHT)
def test_no_false_alarm(tmp_path, machine):
    words = RIGHT[machine]
    path = saved(tmp_path, words)
    assert problems(path, command(words, tmp_path), lazy=True) == []
    with open_image(path) as opened:
        assert opened.sections


@pytest.mark.qemu
def test_what_cannot_be_started_or_moved_at_all(image, tmp_path):
    for more, why in (
        (["-bogus"], "QEMU does not start: .*bogus"),
        (
            ["-device", "nvme,serial=x"],
            "cannot load any image: State blocked by non-migratable device .*nvme",
        ),
    ):
        with pytest.raises(Refused, match=why):
            problems(image, command([*BASE, *more], tmp_path))


@pytest.mark.qemu
def test_the_command(image, tmp_path):
    line = ["preflight", str(image), "--qemu"]
    fits = postcopy(*line, command(BASE, tmp_path), "--lazy")
    assert fits.returncode == 0, fits.stderr
    assert "fits; " in fits.stdout
    small = command([*BASE[:3], "32M", *BASE[4:]], tmp_path)
    outcome = postcopy(*line, small)
    assert outcome.returncode == 1
    assert outcome.stdout.startswith("RAM block pc.ram: another size")
    assert "would not load" in one_line(outcome)
    told = json.loads(postcopy(*line, small, "--json").stdout)
    assert told["fits"] is False
    assert sum(each["problem"] is not None for each in told["checks"]) == 1
