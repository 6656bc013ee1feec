"""The XSAVE area in its standard layout (Intel SDM volume 1, chapter 13.4)."""

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from postcopy.machine.cpu_section import live_components
from postcopy.machine.cpu_state import CpuState, Fpu

_HEAD: Final = struct.Struct("<HHBxHQQI")  # control, status, tags, opcode, ip, dp, MXCSR
_X87_AT: Final = 32
_XMM_AT: Final = 160
_HEADER_AT: Final = 512
_YMM_AT: Final = 576
_BITS_80: Final = (1 << 80) - 1

KNOWN_COMPONENTS: Final = 0b111
"""x87, SSE, AVX: the components whose place in the area is the same on every processor."""


def read_xsave(area: bytes, state: CpuState) -> CpuState:
    """``state`` with the floating point and vector registers of an XSAVE area."""
    control, status, in_use, opcode, ip, dp, mxcsr = _HEAD.unpack_from(area)
    stack = tuple(each & _BITS_80 for each in _read_128(area, _X87_AT, 8))
    (components,) = struct.unpack_from("<Q", area, _HEADER_AT)
    return replace(
        state,
        fpu=Fpu(control, status, in_use, stack, opcode, ip, dp),
        mxcsr=mxcsr,
        xmm=_read_128(area, _XMM_AT, 16),
        # What is in its initial state may not have been written at all.
        ymm_high=_read_128(area, _YMM_AT, 16) if components & 0b100 else (0,) * 16,
        xstate_bv=components,
    )


def write_xsave(area: bytearray, state: CpuState) -> None:
    """Put the floating point and vector registers of ``state`` into an XSAVE area."""
    fpu = state.fpu
    _HEAD.pack_into(
        area,
        0,
        *(fpu.control, fpu.status, fpu.in_use, fpu.last_opcode),
        *(fpu.last_ip, fpu.last_dp, state.mxcsr),
    )
    _write_128(area, _X87_AT, fpu.registers)
    _write_128(area, _XMM_AT, state.xmm)
    _write_128(area, _YMM_AT, state.ymm_high)
    struct.pack_into("<QQ", area, _HEADER_AT, live_components(state) & KNOWN_COMPONENTS, 0)


def _read_128(area: bytes, at: int, count: int) -> tuple[int, ...]:
    starts = range(at, at + 16 * count, 16)
    return tuple(int.from_bytes(area[start : start + 16], "little") for start in starts)


def _write_128(area: bytearray, at: int, values: Sequence[int]) -> None:
    for number, value in enumerate(values):
        area[at + 16 * number : at + 16 * (number + 1)] = value.to_bytes(16, "little")
