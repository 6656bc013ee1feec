"""What a machine is to be like, and what cannot be, said before anything is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from postcopy.errors import Refused
from postcopy.machine import boot, memory_blocks
from postcopy.machine.address_map import AddressMap
from postcopy.machine.memory_blocks import HUGE_PAGE_BYTES, SMALL_PAGE_BYTES, MemoryBlock
from postcopy.vhost_user.front_end import MOST_PARTS

MOST_VCPUS = 64
MOST_MEMORY_BYTES = 64 << 30
MOST_IMAGE_BYTES = 3 << 30

LOAD_ADDRESS = 0x10000

Accelerator = Literal["auto", "kvm", "unicorn"]
MachineType = Literal["microvm", "none"]

DEVICE_OPTIONS: dict[str, str] = {
    "--drive": "drive",
    "--vhost-user-blk": "vhost_user_blk",
    "--vhost-user-net": "vhost_user_net",
}
"""Of the command line, with the field of :class:`MachineConfig`: each gives the guest a virtio device."""

RAM_NAMES: dict[MachineType, str] = {"microvm": "microvm.ram", "none": "ram"}
"""What QEMU calls the RAM block of each of the machines that we can be on the wire."""


@dataclass(frozen=True)
class MachineConfig:
    """One machine.

    :param memory_bytes: RAM, which the guest finds from its address 0 on, a multiple of 2 MiB, up to
        64 GiB.
    :param vcpus: 1 to 64.
    :param accel: ``auto`` takes KVM where it is, else the software CPU.
    :param image: raw 64-bit code and data; None for a destination, whose memory is to come.
    :param load_address: where the image's first byte goes.
    :param entry: where every vCPU begins; a vCPU finds its number in RDI, the size of the memory in
        bytes in RSI, and 512 bytes of stack at RSP.
    :param privilege: 3 (port I/O allowed) or 0.  Under some nested hypervisors code at privilege 0
        is emulated and a thousand times slower.
    :param huge_pages: back the memory with 2 MiB pages from the host's pool, reserved now; it is then
        missing, placed and discarded in those.
    :param transparent_huge_pages: else take 2 MiB pages wherever the kernel has one free, as QEMU
        does; all else stays a matter of 4 KiB.  Not for a guest that is to touch little of its memory:
        its first touch takes, and clears, all of a huge page.
    :param machine_type: what the machine is called on the wire, and with it its RAM block: only a
        machine of the same type takes its guest, be it ours or QEMU's ``-M``.  The guest sees no
        difference; the monitor does, by physical addresses from 3 GiB on.
    :param blocks: the RAM blocks, in the order of their guest addresses, which have ``memory_bytes``
        together; without any there is one, with QEMU's name for it.
    :param drive: path of a file or block device that the guest has as its disk.
    :param vhost_user_blk: in its place, path of the socket of a vhost-user back end that is the disk.
    :param vhost_user_net: else, path of the socket of one that is a network device.
    """

    memory_bytes: int
    vcpus: int = 1
    accel: Accelerator = "auto"
    image: bytes | None = None
    load_address: int = LOAD_ADDRESS
    entry: int = LOAD_ADDRESS
    privilege: int = 3
    huge_pages: bool = False
    transparent_huge_pages: bool = True
    machine_type: MachineType = "microvm"
    blocks: tuple[MemoryBlock, ...] = ()
    drive: str | None = None
    vhost_user_blk: str | None = None
    vhost_user_net: str | None = None

    @property
    def has_device(self) -> bool:
        """Whether the guest has a virtio device, in this process or in another."""
        return bool(self._devices)

    @property
    def _devices(self) -> list[str]:
        """The options that give it one."""
        return [
            option for option, name in DEVICE_OPTIONS.items() if getattr(self, name) is not None
        ]

    @property
    def ram_name(self) -> str:
        """The name of the RAM block where there is one."""
        return RAM_NAMES[self.machine_type]

    @property
    def memory_blocks(self) -> tuple[MemoryBlock, ...]:
        """All RAM blocks, in the order of their guest addresses."""
        if self.blocks:
            return self.blocks
        page_size = HUGE_PAGE_BYTES if self.huge_pages else SMALL_PAGE_BYTES
        return (MemoryBlock(self.ram_name, self.memory_bytes, page_size),)

    @property
    def address_map(self) -> AddressMap:
        """Where the RAM blocks stand among the physical addresses."""
        make = AddressMap.flat if self.machine_type == "none" else AddressMap.with_hole
        return make(*(block.size_bytes for block in self.memory_blocks))

    def check(self) -> None:
        """Refuse what cannot be.

        :raises Refused: which setting, why, and what would do.
        """
        self._check_machine()
        if self.image is not None:
            self._check_image(self.image)

    def _check_machine(self) -> None:
        memory = self.memory_bytes
        if memory <= 0 or memory % HUGE_PAGE_BYTES:
            raise Refused(f"memory of {memory} bytes is not a multiple of 2 MiB; give whole MiB")
        if memory > MOST_MEMORY_BYTES:
            most = MOST_MEMORY_BYTES >> 20
            raise Refused(f"memory of {memory >> 20} MiB is too much for a machine; {most} MiB do")
        if not 1 <= self.vcpus <= MOST_VCPUS:
            raise Refused(f"{self.vcpus} vCPUs cannot be; give 1 to {MOST_VCPUS}")
        if self.privilege not in {0, 3}:
            raise Refused(f"privilege {self.privilege} cannot be; give 3 (user) or 0 (kernel)")
        if self.accel not in {"auto", "kvm", "unicorn"}:
            raise Refused(f"no accelerator is called {self.accel!r}; give auto, kvm or unicorn")
        if self.machine_type not in RAM_NAMES:
            raise Refused(f"no machine is called {self.machine_type!r}; give microvm or none")
        total = sum(block.size_bytes for block in self.memory_blocks)
        if total != memory:
            raise Refused(
                f"the RAM blocks have {total} bytes together, and the memory {memory}; give their sum"
            )
        memory_blocks.check(self.memory_blocks)
        if self.has_device:
            self._check_device()

    def _check_device(self) -> None:
        if self.machine_type != "microvm":
            raise Refused(
                f"the machine '{self.machine_type}' has no place for a virtio device; give --machine "
                "microvm"
            )
        if len(self._devices) > 1:
            raise Refused(
                f"the machine has one virtio device; give one of {' and '.join(self._devices)}"
            )
        if self.drive is None and len(self.address_map.parts) > MOST_PARTS:
            raise Refused(
                f"the memory has {len(self.address_map.parts)} parts, and a vhost-user back end takes "
                f"{MOST_PARTS}; give fewer blocks (--memory-block)"
            )

    def _check_image(self, image: bytes) -> None:
        first, end = self.load_address, self.load_address + len(image)
        if not image:
            raise Refused("the image is empty; give a file of raw 64-bit code")
        for start, stop in boot.reserved(self.memory_bytes, drive=self.has_device):
            if first < stop and start < end:
                raise Refused(
                    f"an image at [{first:#x}, {end:#x}) would lie on the page tables; load it at "
                    f"{stop:#x} or above"
                )
        if end > self.memory_bytes:
            raise Refused(
                f"an image of {len(image)} bytes at {first:#x} does not fit into "
                f"{self.memory_bytes >> 20} MiB of memory; give more memory or a smaller image"
            )
        if not first <= self.entry < end:
            raise Refused(
                f"entry {self.entry:#x} is outside the image [{first:#x}, {end:#x}); "
                "it is an address, not an offset"
            )


def read_image(path: str | Path) -> bytes:
    """Read a file of raw code.

    :raises Refused: it cannot be read, or is larger than 3 GiB.
    """
    try:
        with Path(path).open("rb") as file:
            image = file.read(MOST_IMAGE_BYTES + 1)
    except OSError as error:
        raise Refused(f"image {path} cannot be read: {error.strerror}; check the path") from error
    if len(image) > MOST_IMAGE_BYTES:
        raise Refused(f"image {path} is larger than 3 GiB; give raw 64-bit code")
    return image
