"""What runs the guest's code: KVM where there is one, a software CPU elsewhere."""

import importlib.util
from typing import TYPE_CHECKING, Protocol

from postcopy.errors import HostCannot
from postcopy.kernel.mapping import Mapping
from postcopy.machine.address_map import AddressMap
from postcopy.machine.config import MachineConfig
from postcopy.machine.cpu import Cpu, MmioWindow, Ports
from postcopy.machine.kvm_cpu import KvmAccelerator

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Accelerator(Protocol):
    """What makes vCPUs for one machine, and knows its memory."""

    @property
    def name(self) -> str:
        """``kvm`` or ``unicorn``."""

    def create_cpu(self, index: int, ports: Ports, window: MmioWindow | None = None) -> Cpu:
        """The vCPU of that number, in its reset state.

        :param window: what it finds beside RAM; without one an access there ends the guest.
        """

    def signal_at_write(self, guest_address: int, value: int, fd: int) -> None:
        """The guest's write of a 32-bit value there need not come to the window: signal an eventfd."""

    def start_dirty_log(self) -> None:
        """Begin to note which pages vCPUs write.

        :raises HostCannot: this accelerator has no such log.
        """

    def stop_dirty_log(self) -> None:
        """Stop noting; harmless when not started."""

    def fetch_dirty_log(self, start: int, end: int) -> "npt.NDArray[np.uint8]":
        """One bit for each 4 KiB page written since the last call, lowest bit first.

        :param start: offsets in RAM of whole blocks: first and end.
        """

    def close(self) -> None:
        """After the vCPUs have been closed."""


def choose(config: MachineConfig, ram: Mapping) -> Accelerator:
    """Make the accelerator that the settings ask for.

    :raises HostCannot: this host has it not; with ``auto``, it has none at all.
    """
    addresses = config.address_map
    if config.accel == "unicorn":
        return _unicorn(ram, addresses)
    try:
        return KvmAccelerator(ram, addresses)
    except HostCannot:
        if config.accel == "kvm" or importlib.util.find_spec("unicorn") is None:
            raise
    return _unicorn(ram, addresses)


def _unicorn(ram: Mapping, addresses: AddressMap) -> Accelerator:
    if importlib.util.find_spec("unicorn") is None:
        raise HostCannot("the software CPU is not installed", "pip install 'postcopy[unicorn]'")
    from postcopy.machine.unicorn_cpu import UnicornAccelerator

    return UnicornAccelerator(ram, addresses)
