"""Runs a guest from its image, in a new process."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, Unpack

from postcopy.client.launch import MachineProcess
from postcopy.client.machine import AwaitableContext, Machine
from postcopy.client.qmp import QmpConnection
from postcopy.client.result import FaultLatency, fault_latency
from postcopy.errors import MigrationFailed, NeedsRecovery
from postcopy.status import Status

_INTERVAL_S: Final = 0.02
_OF_A_RESTORE: Final = frozenset({"postcopy-active", "postcopy-paused", "failed"})


class RestoreOptions(TypedDict, total=False):
    """How to restore; see ``postcopy restore --help``."""

    lazy: bool
    prefetch: Literal["auto", "off"]
    record_working_set: bool
    accel: Literal["auto", "kvm", "unicorn"]
    huge_pages: bool
    memory_block: Sequence[str]
    mem_path: str
    drive: str
    vhost_user_blk: str
    vhost_user_net: str
    paused: bool
    name: str
    serial: str
    trace: str


@dataclass(frozen=True, slots=True)
class Restored:
    """A restore that has completed.  Times are from the start of the guest's process.

    :ivar running_ms: until the guest ran.
    :ivar ready_ms: until it had its working set, or all memory if no working set was recorded.
    :ivar complete_ms: until it had all of its memory.
    :ivar demand_faults: pages for which a thread waited.
    :ivar working_set_pages: pages of the working set; None: no working set was recorded.
    :ivar source: the last answer to ``query-migrate``, whole.
    """

    running_ms: float
    ready_ms: float
    complete_ms: float
    demand_faults: int
    working_set_pages: int | None = None
    fault_latency: FaultLatency | None = None
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)


class RestoredMachine(Machine):
    """A machine whose guest runs from an image."""

    async def restored(self) -> Restored:
        """Wait until the guest has all of its memory, also while a migration is ordered.

        :raises MigrationFailed: pages are lost; the text names file, block and offset, and the guest
            runs on without them.
        :raises NeedsRecovery: no engine can go on; the guest waits, and nothing is lost.
        """
        while not _is_whole(info := await self.migration_info()):
            if info.get("status") == Status.FAILED.value:
                raise MigrationFailed(info.get("error-desc", "the restore failed"))
            if info.get("status") == Status.POSTCOPY_PAUSED.value:
                raise NeedsRecovery(info.get("error-desc", "the restore is paused"))
            await asyncio.sleep(_INTERVAL_S)
        return _restored(info)


def restore(
    path: str | Path, **options: Unpack[RestoreOptions]
) -> AwaitableContext[RestoredMachine]:
    """Start ``postcopy restore`` on the image at ``path``, and connect to it.

    :return: to be awaited, or used in ``async with``.
    :raises Refused: the image is damaged, or of a machine that postcopy cannot run.
    :raises CannotConnect: it ended at once; the text says why.
    """
    return AwaitableContext(_restore(path, options))


async def _restore(path: str | Path, options: RestoreOptions) -> RestoredMachine:
    connection: QmpConnection
    process, connection = await MachineProcess.start(options, "restore", str(path))
    return RestoredMachine(connection, process)


def _is_whole(info: Mapping[str, Any]) -> bool:
    """Whether the restore has completed; the status may be that of a later migration."""
    status = info.get("status")
    complete = "restore-complete-us" in info.get("x-postcopy", {})
    return status == Status.COMPLETED.value or (complete and status not in _OF_A_RESTORE)


def _restored(info: Mapping[str, Any]) -> Restored:
    measured = info.get("x-postcopy", {})
    return Restored(
        running_ms=measured.get("restore-running-us", 0) / 1000,
        ready_ms=measured.get("restore-ready-us", 0) / 1000,
        complete_ms=measured.get("restore-complete-us", 0) / 1000,
        demand_faults=measured.get("demand-faults", 0),
        working_set_pages=measured.get("working-set-pages"),
        fault_latency=fault_latency(measured),
        source=info,
    )
