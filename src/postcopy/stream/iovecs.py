"""Bytes that lie in many places, in the order in which they go out."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

IovecTable: TypeAlias = npt.NDArray[np.uint64]
"""Address and length in bytes of each piece (``struct iovec``, see ``readv(2)``), shape ``(n, 2)``."""


@dataclass(frozen=True, slots=True, eq=False)
class Iovecs:
    """Pieces of memory, as the kernel's gathering calls want them.

    :ivar n_bytes: what they come to.
    :ivar keeps: what the memory belongs to, which is there as long as this is.
    """

    table: IovecTable
    n_bytes: int
    keeps: tuple[object, ...]

    def __len__(self) -> int:
        return self.n_bytes

    def __bytes__(self) -> bytes:
        """Copy them together, as they are now."""
        return b"".join(ctypes.string_at(at, length) for at, length in self.table.tolist())


Part: TypeAlias = bytes | memoryview | Iovecs


def joined(parts: Sequence[Part]) -> IovecTable:
    """One table for all of them; it holds as long as the parts are there."""
    return np.concatenate([_table(part) for part in parts])


def _table(part: Part) -> IovecTable:
    if isinstance(part, Iovecs):
        return part.table
    data = np.frombuffer(part, np.uint8)
    return np.array(((address_of(data), len(data)),), np.uint64)


def address_of(data: npt.NDArray[Any]) -> int:
    """Where an array begins."""
    address: int = data.__array_interface__["data"][0]
    return address
