"""Software vCPUs over the guest's memory, for hosts without KVM (unicorn, which is QEMU's TCG)."""

import numpy as np
import numpy.typing as npt

from postcopy.errors import HostCannot
from postcopy.kernel.mapping import Mapping
from postcopy.machine.address_map import AddressMap
from postcopy.machine.cpu import Ports
from postcopy.machine.unicorn_cpu import MappedMemory, UnicornCpu, load_unicorn


class UnicornAccelerator:
    """Makes a software vCPU with an engine of its own for each number; they share the memory.

    Locked instructions are atomic within one vCPU only: guests that share locks between vCPUs need
    KVM.

    :param addresses: where the memory stands among the guest's physical addresses.
    :raises HostCannot: unicorn is not installed.
    """

    name = "unicorn"

    def __init__(self, ram: Mapping, addresses: AddressMap) -> None:
        load_unicorn()
        self._memory = [
            MappedMemory(part.guest_address, ram.address + part.offset, part.size_bytes)
            for part in addresses.parts
        ]

    def create_cpu(self, index: int, ports: Ports) -> UnicornCpu:  # noqa: ARG002 - all are alike
        """A vCPU in its reset state; give it a 64-bit one before it is entered."""
        return UnicornCpu(ports, self._memory)

    def start_dirty_log(self) -> None:
        """There is none: the memory is written by ordinary stores of this process.

        :raises HostCannot: always.
        """
        raise HostCannot("the software CPU keeps no dirty log", "track dirty pages by pagemap")

    def stop_dirty_log(self) -> None:
        """Nothing was started."""

    def fetch_dirty_log(self, start: int, end: int) -> npt.NDArray[np.uint8]:  # noqa: ARG002
        """See :meth:`start_dirty_log`.

        :raises HostCannot: always.
        """
        raise HostCannot("the software CPU keeps no dirty log", "track dirty pages by pagemap")

    def close(self) -> None:
        """The vCPUs hold everything there is."""
