"""What ``<asm-generic/ioctl.h>`` says: how an ioctl request number is made."""

import ctypes
from dataclasses import dataclass
from typing import Generic, TypeVar

_NONE, _WRITE, _READ = 0, 1, 2

Argument = TypeVar("Argument", bound=ctypes.Structure)


@dataclass(frozen=True, slots=True)
class Ioctl(Generic[Argument]):
    """A request, tied to the structure that the kernel expects with it."""

    name: str
    number: int


@dataclass(frozen=True, slots=True)
class PlainIoctl:
    """A request that takes a number (often 0, meaning none) in the place of a structure."""

    name: str
    number: int


def io(name: str, group: int, nr: int) -> PlainIoctl:
    """Declare a request without a structure (``_IO``)."""
    return PlainIoctl(name, _number(_NONE, group, nr, 0))


def ior(name: str, group: int, nr: int, argument: type[Argument]) -> Ioctl[Argument]:
    """Declare a request whose argument the kernel only fills in (``_IOR``)."""
    return Ioctl(name, _number(_READ, group, nr, ctypes.sizeof(argument)))


def iow(name: str, group: int, nr: int, argument: type[Argument]) -> Ioctl[Argument]:
    """Declare a request whose argument the kernel only reads (``_IOW``)."""
    return Ioctl(name, _number(_WRITE, group, nr, ctypes.sizeof(argument)))


def iowr(name: str, group: int, nr: int, argument: type[Argument]) -> Ioctl[Argument]:
    """Declare a request whose argument the kernel reads and then fills in (``_IOWR``)."""
    return Ioctl(name, _number(_READ | _WRITE, group, nr, ctypes.sizeof(argument)))


def _number(direction: int, group: int, nr: int, size_bytes: int) -> int:
    return direction << 30 | size_bytes << 16 | group << 8 | nr
