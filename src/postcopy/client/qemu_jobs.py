"""Jobs of a real QEMU (``query-jobs``): begun, and waited for."""

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from typing import Any, Final

from postcopy.client.qmp import QmpConnection
from postcopy.errors import Refused

_POLL_S: Final = 0.002


async def run_job(machine: QmpConnection, command: str, **arguments: Any) -> None:
    """Begin a job, complete it when it is ready, and return when it has ended.

    :raises Refused: QEMU refuses it, or it has failed, with QEMU's words.
    """
    name = f"postcopy-{secrets.token_hex(4)}"
    await machine.execute(command, {"job-id": name, **arguments})
    while (job := await _find(machine, name)) is not None and job["status"] != "concluded":
        if job["status"] == "ready":
            with contextlib.suppress(Refused):  # it has been told before
                await machine.execute("job-complete", {"id": name})
        await asyncio.sleep(_POLL_S)
    await machine.execute("job-dismiss", {"id": name})
    if job is not None and "error" in job:
        raise Refused(f"QEMU's {command} has failed: {job['error']}")


async def _find(machine: QmpConnection, name: str) -> Mapping[str, Any] | None:
    jobs = await machine.execute("query-jobs")
    return next((job for job in jobs if job["id"] == name), None)
