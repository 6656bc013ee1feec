"""The workloads: guests that record their own writes.  ``workloads/README.md`` describes the layout."""

import struct
from dataclasses import dataclass, replace
from typing import Final

from postcopy.errors import Refused
from postcopy.machine.boot import DEVICES_ADDRESS, DEVICES_PHYSICAL_ADDRESS
from postcopy.machine.virtio_state import ADDRESS

NAMES: Final = ("disk", "hammer", "idle", "net", "sweep")
BASE_ADDRESS: Final = 0x200000
PAGE_BYTES: Final = 4096
BLOCK_BYTES: Final = 4096

DEVICE_AREA_BYTES: Final = 2 << 20
"""Of the workloads ``disk`` and ``net``: rings, records and buffers, before the slices."""

MOST_DISK_BLOCKS: Final = 4096
_DISK_BUFFERS: Final = 256
_NET_BUFFERS: Final = 128
_DEVICE_REGISTERS: Final = ADDRESS - DEVICES_PHYSICAL_ADDRESS + DEVICES_ADDRESS

_PARAMETERS_AT = 0x40
_PARAMETERS = struct.Struct("<8s9Q")
_DEVICE_PARAMETERS = struct.Struct("<4Q")
_MAGIC = b"PCYWRK01"
_SEED = 0x9E3779B97F4A7C15
_SAY_RUNNING = 1
_PACED = {"disk", "net", "sweep"}


@dataclass(frozen=True)
class Workload:
    """One workload with its parameters: all that is needed to run it and to check its memory.

    :param base_address: where the first slice begins, of whole pages.
    :param slice_bytes: what each vCPU fills, whole pages; slices follow one another.
    :param hot_bytes: what each vCPU visits, from the beginning of its slice.
    :param delay_cycles: least TSC cycles from one visit to the next; 0 is full speed.
    :param exit_after: vCPU 0 switches the machine off after so many visits; 0 is never.
    :param disk_blocks: blocks of the drive that ``disk`` uses, from the first on.
    :param disk_buffers: pages of memory that it writes them from and reads them into.
    :param net_buffers: pages of memory that ``net`` sends from, and as many that it receives into.
    :param say_running: vCPU 0 writes ``R`` to the serial port when its slice is filled.
    """

    name: str
    memory_bytes: int
    vcpus: int
    slice_bytes: int
    hot_bytes: int
    seed: int = _SEED
    delay_cycles: int = 0
    exit_after: int = 0
    say_running: bool = False
    base_address: int = BASE_ADDRESS
    disk_blocks: int = 0
    disk_buffers: int = _DISK_BUFFERS
    net_buffers: int = 0

    @property
    def device_area(self) -> int:
        """Where ``disk`` and ``net`` keep what they need for the device."""
        return self.base_address - DEVICE_AREA_BYTES

    @property
    def pages(self) -> int:
        """Pages of all slices together."""
        return self.vcpus * self.slice_bytes // PAGE_BYTES

    def slice_address(self, vcpu: int) -> int:
        """Where the slice of a vCPU begins."""
        return self.base_address + vcpu * self.slice_bytes

    def image(self) -> bytes:
        """The image, parameters patched in; load and enter it at 0x10000."""
        from importlib import resources  # takes long to import, and a destination does not need it

        directory = resources.files("postcopy.machine") / "workloads"
        image = bytearray((directory / f"{self.name}.bin").read_bytes())
        _PARAMETERS.pack_into(
            image,
            _PARAMETERS_AT,
            _MAGIC,
            self.vcpus,
            self.base_address,
            self.slice_bytes,
            self.hot_bytes,
            self.seed,
            self.delay_cycles,
            _SAY_RUNNING if self.say_running else 0,
            self.exit_after,
            self.memory_bytes,
        )
        if self.disk_blocks or self.net_buffers:
            at = _PARAMETERS_AT + _PARAMETERS.size
            buffers = self.net_buffers or self.disk_buffers
            device = _DEVICE_REGISTERS, self.device_area, self.disk_blocks, buffers
            _DEVICE_PARAMETERS.pack_into(image, at, *device)
        return bytes(image)


def load(
    name: str,
    memory_bytes: int,
    vcpus: int = 1,
    *,
    fill_bytes: int | None = None,
    hot_bytes: int | None = None,
    delay_cycles: int | None = None,
    seed: int = _SEED,
    base_address: int = BASE_ADDRESS,
    disk_bytes: int = 0,
) -> Workload:
    """A workload cut to a machine; change more with :func:`dataclasses.replace`.

    :param fill_bytes: of all vCPUs together; all memory from ``base_address`` on, or half of it for
        ``idle``.
    :param hot_bytes: of all vCPUs together; half the memory for ``hammer``, all that is filled for
        ``sweep``.
    :param delay_cycles: 50 000 (about 20 us) for ``disk``, ``net`` and ``sweep``, else none.
    :param base_address: where to begin to fill, 2 MiB or more: a way to use the far end of a memory
        that is mostly empty.
    :param disk_bytes: size of the drive, for ``disk``, which uses its first 16 MiB at most.
    :raises Refused: there is no such workload, or it does not fit.
    """
    if name not in NAMES:
        raise Refused(f"no workload is called {name!r}; give {', '.join(NAMES)}")
    blocks = 0
    if name == "disk":
        blocks = min(disk_bytes // BLOCK_BYTES, MOST_DISK_BLOCKS)
        if not blocks:
            raise Refused(
                "the workload disk needs a drive of 4096 bytes or more; give --drive FILE or "
                "--vhost-user-blk SOCKET"
            )
    if name in {"disk", "net"}:
        base_address += DEVICE_AREA_BYTES
    room = memory_bytes - base_address
    fill = fill_bytes if fill_bytes is not None else room // (2 if name == "idle" else 1)
    hot = hot_bytes if hot_bytes is not None else memory_bytes // 2 if name == "hammer" else fill
    slice_bytes = _whole_pages(fill, vcpus)
    hot_slice = min(_whole_pages(hot, vcpus), slice_bytes)
    if fill > room or hot_slice < PAGE_BYTES or base_address < BASE_ADDRESS:
        raise Refused(
            f"{name} cannot fill {fill} bytes of {memory_bytes >> 20} MiB with {vcpus} vCPUs; "
            "it needs a page for each and leaves the first 2 MiB alone"
        )
    workload = Workload(name, memory_bytes, vcpus, slice_bytes, hot_slice, seed)
    delay = delay_cycles if delay_cycles is not None else 50_000 if name in _PACED else 0
    return replace(
        workload,
        delay_cycles=delay,
        base_address=base_address,
        disk_blocks=blocks,
        net_buffers=_NET_BUFFERS if name == "net" else 0,
    )


def _whole_pages(total_bytes: int, shares: int) -> int:
    return total_bytes // shares // PAGE_BYTES * PAGE_BYTES
