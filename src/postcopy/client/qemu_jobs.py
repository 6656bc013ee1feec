"""Jobs of a real QEMU (``query-jobs``), begun and waited for; and what its background snapshots need."""

import asyncio
import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from postcopy.client.progress import status_of
from postcopy.client.qmp import QmpConnection
from postcopy.errors import Refused
from postcopy.status import Status

_POLL_S: Final = 0.002
_PREFIX: Final = "postcopy-"
_FAILS_SAFELY: Final = 10
_KNOWS_FILES: Final = (8, 2)
_FD_NAME: Final = "postcopy"
_MODE: Final = 0o600  # guest memory holds keys and passwords


async def run_job(machine: QmpConnection, command: str, **arguments: Any) -> None:
    """Begin a job, complete it when it is ready, and return when it has ended.

    :raises Refused: QEMU refuses it, or it has failed, with QEMU's words.
    """
    name = f"{_PREFIX}{secrets.token_hex(4)}"
    await machine.execute(command, {"job-id": name, **arguments})
    job = await _until_ended(machine, name)
    if job is not None and "error" in job:
        raise Refused(f"QEMU's {command} has failed: {job['error']}")


async def end_jobs(machine: QmpConnection) -> None:
    """Wait for the ends of the jobs that a killed command has begun."""
    for job in await machine.execute("query-jobs"):
        if job["id"].startswith(_PREFIX):
            await _until_ended(machine, job["id"])


async def _until_ended(machine: QmpConnection, name: str) -> Mapping[str, Any] | None:
    while (job := await _find(machine, name)) is not None and job["status"] != "concluded":
        if job["status"] == "ready":
            with contextlib.suppress(Refused):  # it has been told before
                await machine.execute("job-complete", {"id": name})
        await asyncio.sleep(_POLL_S)
    await machine.execute("job-dismiss", {"id": name})
    return job


async def _find(machine: QmpConnection, name: str) -> Mapping[str, Any] | None:
    jobs = await machine.execute("query-jobs")
    return next((job for job in jobs if job["id"] == name), None)


async def hangs_on_failure(machine: QmpConnection) -> bool:
    """Whether a cancel, or a full disk, leaves the memory write-protected and the vCPUs waiting.

    QEMU 7.2 does so, 10.0 does not; those in between have not been tried.
    """
    version = (await machine.version())["qemu"]
    major: int = version["major"]
    return major < _FAILS_SAFELY


async def until_protected(machine: QmpConnection) -> None:
    """Wait until a QEMU has write-protected the memory; pages are sent from then on only."""
    while True:
        answer: Mapping[str, Any] = await machine.execute("query-migrate")
        ram = answer.get("ram", {})
        if ram.get("normal", 0) + ram.get("duplicate", 0) > 0:
            return
        if status_of(answer) not in {Status.SETUP, Status.ACTIVE}:
            return
        await asyncio.sleep(_POLL_S)


async def file_uri(machine: QmpConnection, path: Path) -> str:
    """Return the URI by which a machine writes to a file.

    A QEMU before 8.2 has no ``file:``: this process opens the file and passes the descriptor.

    :raises Refused: the file cannot be made, or its descriptor not be passed.
    """
    version = (await machine.version())["qemu"]
    if await machine.is_ours() or (version["major"], version["minor"]) >= _KNOWS_FILES:
        return f"file:{path}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
    except OSError as error:
        raise Refused(f"Failed to open {path}: {error.strerror}; give another path") from error
    try:
        await machine.give(_FD_NAME, fd)
    finally:
        os.close(fd)
    return f"fd:{_FD_NAME}"
