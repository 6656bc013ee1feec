"""Whether memory holds the frames that the workload ``net`` has sent, and those that came back.

Only for a guest that stands still.  The rules are those of ``workloads/README.md``.  The guest's slices
are checked by :mod:`postcopy.machine.oracle`; here are the buffers, which the back end reads and writes.
"""

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np

from postcopy.errors import GuestError
from postcopy.machine.oracle import mix
from postcopy.machine.workload import PAGE_BYTES, Workload
from postcopy.machine.workload_records import Read

_RECORD, _HELD, _BUFFERS = 0x4000, 0x5000, 0x10000
_MAGIC: Final = b"PC_NET01"
_FIELDS: Final = struct.Struct("<8s12Q")
_AT_WORK: Final = 1
_FRAME_BYTES: Final = 1512
_CHECKED_FROM: Final = 32


@dataclass(frozen=True, slots=True)
class NetRecord:
    """What vCPU 0 has noted about the network; see ``workloads/README.md``."""

    phase: int
    sent_from: int
    counter: int
    buffer: int
    frames: int
    again: int
    others: int
    wrong: int
    state: int
    receive: int
    received: int
    send: int


@dataclass(frozen=True, slots=True)
class NetVerification:
    """What the oracle found.

    :ivar frames: how many have come back; ``again``: were sent once more, since they did not.
    :ivar others: how many came that were not awaited: those that were sent once more, or of others.
    :ivar wrong_frames: how many came back changed, as the guest itself has seen.
    :ivar bad_buffers: those in memory that are not what was last sent from, or received in, them.
    """

    frames: int
    again: int
    others: int
    wrong_frames: int
    bad_buffers: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether all is exactly as the guest left it."""
        return not (self.wrong_frames or self.bad_buffers)


def read_net_record(read: Read, workload: Workload) -> NetRecord:
    """The record of the network.

    :raises GuestError: the guest has not come to its network device yet, or has found none.
    """
    magic, *fields = _FIELDS.unpack(read(workload.device_area + _RECORD, _FIELDS.size))
    record = NetRecord(*fields)
    if magic != _MAGIC or not record.state:
        raise GuestError("the guest has not begun to use its network; wait for its record")
    if record.state != _AT_WORK:
        raise GuestError(f"the guest has found no network device that it can use ({record.state})")
    return record


def verify_net(read: Read, workload: Workload) -> NetVerification:
    """Compare the buffers in memory with what they must be.

    :raises GuestError: the guest has found no network device.
    """
    record = read_net_record(read, workload)
    return NetVerification(
        frames=record.frames,
        again=record.again,
        others=record.others,
        wrong_frames=record.wrong,
        bad_buffers=tuple(_bad_buffers(read, workload, record)),
    )


def _bad_buffers(read: Read, workload: Workload, record: NetRecord) -> list[int]:
    area, count = workload.device_area, 2 * workload.net_buffers
    held = np.frombuffer(read(area + _HELD, 16 * count), "<u8").reshape(-1, 2)
    raw = read(area + _BUFFERS, count * PAGE_BYTES)
    pages = np.frombuffer(raw, "<u8").reshape(count, -1)
    first, end = _CHECKED_FROM // 8, _FRAME_BYTES // 8
    offsets = np.arange(_CHECKED_FROM, _FRAME_BYTES, 8, dtype=np.uint64)
    bases = mix(mix(held[:, 0] + np.uint64(workload.seed)) + held[:, 1])
    expected = bases[:, np.newaxis] ^ mix(offsets)
    expected[:, :2] = held
    expected[held[:, 1] == 0] = 0  # never used
    bad = (pages[:, first:end] != expected).any(axis=1) | (pages[:, end:] != 0).any(axis=1)
    under_way = {record.sent_from, record.buffer} if record.phase else set()
    return [number for number in np.flatnonzero(bad).tolist() if number not in under_way]
