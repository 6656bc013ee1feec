"""Whether anybody on this host keeps the CPUs awake: a measurement must know, and may ask for it itself.

Source: the kernel's ``Documentation/power/pm_qos_interface.rst``.
"""

import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from postcopy.kernel.cpu_latency import DEVICE

_VALUE: Final = struct.Struct("=i")  # microseconds
_NOBODY_ASKS: Final = 2_000_000_000  # PM_QOS_CPU_LATENCY_DEFAULT_VALUE
_LOOK_S: Final = 0.01


def wait_until_cpus_may_sleep(timeout_s: float = 10, device: Path = DEVICE) -> None:
    """Wait until nobody asks for CPUs that are awake; where nobody can, that is so already.

    :raises TimeoutError: somebody still does.
    """
    end = time.monotonic() + timeout_s
    while (latency_us := _asked_us(device)) < _NOBODY_ASKS:
        if time.monotonic() > end:
            raise TimeoutError(
                f"somebody asks for CPUs that wake within {latency_us} us; "
                f"'fuser {device}' says who: end it, or wait"
            )
        time.sleep(_LOOK_S)


@contextmanager
def cpus_awake(device: Path = DEVICE) -> Iterator[None]:
    """Keep the CPUs awake.

    :raises OSError: this host cannot, or not for this user.
    """
    request = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(request, _VALUE.pack(0))
        yield
    finally:
        os.close(request)  # which ends it


def _asked_us(device: Path) -> int:
    try:
        found: int = _VALUE.unpack(device.read_bytes()[: _VALUE.size])[0]
    except OSError:
        return _NOBODY_ASKS
    return found
