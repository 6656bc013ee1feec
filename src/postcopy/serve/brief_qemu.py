"""A QEMU that runs no guest: it is asked something, and ends."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Final

from postcopy.client.qmp import QmpConnection
from postcopy.errors import PostcopyError, Refused

_START_S: Final = 60.0
_ENDS_S: Final = 1.0


@contextlib.asynccontextmanager
async def brief_qemu(line: Sequence[str]) -> AsyncIterator[QmpConnection]:
    """Start a QEMU with a monitor of our own, which is the value; end it behind the context.

    :param line: its command line, which has ``-S``.
    :raises Refused: it cannot be started, or ended at once; the text has its last line.
    """
    ours, theirs = socket.socketpair()
    monitor = ["-chardev", f"socket,id=brief,fd={theirs.fileno()}", "-mon", "brief,mode=control"]
    try:
        process = await asyncio.create_subprocess_exec(
            *line, *monitor, stderr=asyncio.subprocess.PIPE, pass_fds=[theirs.fileno()]
        )
    except OSError as error:
        ours.close()
        raise Refused(f"cannot start '{line[0]}': {error.strerror}; look at --qemu") from error
    finally:
        theirs.close()
    try:
        machine = await _connected(process, ours, line[0])
        try:
            yield machine
        finally:
            await machine.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()  # it has no guest
        await process.wait()


async def _connected(
    process: asyncio.subprocess.Process, monitor: socket.socket, name: str
) -> QmpConnection:
    assert process.stderr is not None
    errors = asyncio.create_task(_last_line(process.stderr))  # or a full pipe would stop it
    try:
        return await QmpConnection.over(monitor, name, timeout_s=_START_S)
    except PostcopyError as error:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _ENDS_S)
        if process.returncode is None:
            raise
        raise Refused(f"QEMU does not start: {await errors or error}") from error
    finally:
        errors.cancel()


async def _last_line(stream: asyncio.StreamReader) -> str:
    last = ""
    while line := await stream.readline():
        last = line.decode(errors="replace").strip() or last
    return last
