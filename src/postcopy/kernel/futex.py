"""Set a bit of memory that other processes change at the same time, by the kernel's atomic OR.

``FUTEX_WAKE_OP`` changes a word before it wakes the threads that wait at it; here no thread waits, and
the change is all that is wanted.  It is a locked instruction of the processor, and so a full barrier.
"""

import os
from typing import Final

from postcopy.abi import linux as abi
from postcopy.kernel.calls import syscall

_NUMBER: Final = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(os.uname().machine, -1)
_OPERATION: Final = abi.FUTEX_WAKE_OP | abi.FUTEX_PRIVATE_FLAG
_OR_BIT: Final = (abi.FUTEX_OP_OR | abi.FUTEX_OP_OPARG_SHIFT) << 28 | abi.FUTEX_OP_CMP_EQ << 24


def set_bit(address: int, bit: int) -> None:
    """Set bit 0 to 31 of the u32 at an address of this process, whatever other bits become meanwhile.

    :param address: a multiple of 4, of writable memory.
    :raises KernelError: ``EFAULT``: there is no such memory; ``ENOSYS``: not on this kind of processor.
    """
    syscall("futex", _NUMBER, address, _OPERATION, 0, 0, address, _OR_BIT | bit << 12)
