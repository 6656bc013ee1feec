"""The client without ``async``, for scripts: same names, same arguments, blocking.

Every call runs the asynchronous one on an event loop in a thread of its own.  Any thread may call.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, Unpack

from postcopy.client.machine import AwaitableContext, Closable, RunOptions
from postcopy.client.machine import Machine as AsyncMachine
from postcopy.client.migration import Migration as AsyncMigration
from postcopy.client.migration_order import MigrateOptions
from postcopy.client.progress import Progress
from postcopy.client.reset_point import ResetPoint as AsyncResetPoint
from postcopy.client.restored_machine import RestoredMachine as AsyncRestoredMachine
from postcopy.client.restored_machine import RestoreOptions
from postcopy.client.restored_machine import restore as restore_asynchronously
from postcopy.client.snapshot import SnapshotJob as AsyncSnapshotJob
from postcopy.client.snapshot import SnapshotOptions
from postcopy.status import Status

if TYPE_CHECKING:
    from postcopy.bench.link_bench import LinkBench, LinkOptions

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=Closable)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The one event loop of all twins; it has no state but the tasks of its users."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="postcopy-client", daemon=True).start()
    return loop


def _wait(work: Coroutine[Any, Any, R]) -> R:
    waiting = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return waiting.result()
    except BaseException:
        waiting.cancel()  # a Ctrl-C here ends the work there
        raise


class _Twin(Protocol):
    @property
    def asynchronous(self) -> Any:
        """The object that does the work."""


def _blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[_Twin, P], R]:
    """Make the blocking twin of an asynchronous method, with its signature and its words."""

    def call(self: _Twin, /, *arguments: P.args, **options: P.kwargs) -> R:
        return _wait(method(self.asynchronous, *arguments, **options))

    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


class Migration:
    """Blocking twin of :class:`postcopy.client.Migration`."""

    def __init__(self, asynchronous: AsyncMigration) -> None:
        self.asynchronous = asynchronous

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the order."""
        return self.asynchronous.notes

    @property
    def source_address(self) -> str:
        """Where the source's QMP monitor is."""
        return self.asynchronous.source_address

    @property
    def status(self) -> Status | str:
        """As the source said when it was last asked; a ``str`` if this client does not know it."""
        return self.asynchronous.status

    @property
    def progress(self) -> Progress:
        """The last look at it."""
        return self.asynchronous.progress

    def events(self) -> Iterator[Progress]:
        """Yield each look at the migration until it ends."""
        return _iterate(self.asynchronous.events())

    result = _blocking(AsyncMigration.result)
    start_postcopy = _blocking(AsyncMigration.start_postcopy)
    cancel = _blocking(AsyncMigration.cancel)
    recover = _blocking(AsyncMigration.recover)


class SnapshotJob:
    """Blocking twin of :class:`postcopy.client.SnapshotJob`."""

    def __init__(self, asynchronous: AsyncSnapshotJob) -> None:
        self.asynchronous = asynchronous

    @property
    def path(self) -> Path:
        """Of the image to be."""
        return self.asynchronous.path

    @property
    def progress(self) -> Progress:
        """The last look at it."""
        return self.asynchronous.progress

    def events(self) -> Iterator[Progress]:
        """Yield looks at the snapshot until it ends."""
        return _iterate(self.asynchronous.events())

    result = _blocking(AsyncSnapshotJob.result)
    cancel = _blocking(AsyncSnapshotJob.cancel)
    give_up = _blocking(AsyncSnapshotJob.give_up)


class ResetPoint:
    """Blocking twin of :class:`postcopy.client.ResetPoint`; use it in ``with``, or call ``end``."""

    def __init__(self, asynchronous: AsyncResetPoint) -> None:
        self.asynchronous = asynchronous

    @property
    def pause_us(self) -> int:
        """How long the guest stood still, in microseconds."""
        return self.asynchronous.pause_us

    @property
    def copied_bytes(self) -> int:
        """Of its memory, copied while it ran and then; 0 if the point is an image."""
        return self.asynchronous.copied_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    reset = _blocking(AsyncResetPoint.reset)
    end = _blocking(AsyncResetPoint.end)
    close = _blocking(AsyncResetPoint.close)


class Machine:
    """Blocking twin of :class:`postcopy.client.Machine`; use it in ``with``."""

    def __init__(self, asynchronous: AsyncMachine) -> None:
        self.asynchronous = asynchronous

    @classmethod
    def connect(cls, address: str) -> Self:
        """As :meth:`postcopy.client.Machine.connect`."""
        return cls(_wait(_opened(AsyncMachine.connect(address))))

    @classmethod
    def start(cls, **options: Unpack[RunOptions]) -> Self:
        """As :meth:`postcopy.client.Machine.start`."""
        return cls(_wait(_opened(AsyncMachine.start(**options))))

    @property
    def address(self) -> str:
        """Where its QMP monitor is."""
        return self.asynchronous.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def migrate(
        self,
        uri: str | None = None,
        *,
        to: "Machine | None" = None,
        **options: Unpack[MigrateOptions],
    ) -> Migration:
        """As :meth:`postcopy.client.Machine.migrate`."""
        theirs = None if to is None else to.asynchronous
        return Migration(_wait(self.asynchronous.migrate(uri, to=theirs, **options)))

    def recover(
        self,
        uri: str | None = None,
        *,
        to: "Machine",
        auto_recover: float | None = None,
        tls: str | None = None,
        tls_hostname: str | None = None,
    ) -> Migration:
        """As :meth:`postcopy.client.Machine.recover`."""
        migration = self.asynchronous.recover(
            uri,
            to=to.asynchronous,
            auto_recover=auto_recover,
            tls=tls,
            tls_hostname=tls_hostname,
        )
        return Migration(_wait(migration))

    def start_snapshot(self, path: str | Path, **options: Unpack[SnapshotOptions]) -> SnapshotJob:
        """As :meth:`postcopy.client.Machine.start_snapshot`."""
        return SnapshotJob(_wait(self.asynchronous.start_snapshot(path, **options)))

    snapshot = _blocking(AsyncMachine.snapshot)

    def reset_point(self, path: str | Path | None = None) -> ResetPoint:
        """As :meth:`postcopy.client.Machine.reset_point`; also for ``with``."""
        return ResetPoint(_wait(_opened(self.asynchronous.reset_point(path))))

    estimate = _blocking(AsyncMachine.estimate)
    put_back_snapshot = _blocking(AsyncMachine.put_back_snapshot)
    reset = _blocking(AsyncMachine.reset)
    reset_end = _blocking(AsyncMachine.reset_end)
    close = _blocking(AsyncMachine.close)
    execute = _blocking(AsyncMachine.execute)
    run_state = _blocking(AsyncMachine.run_state)
    stop = _blocking(AsyncMachine.stop)
    cont = _blocking(AsyncMachine.cont)
    quit = _blocking(AsyncMachine.quit)
    migration_info = _blocking(AsyncMachine.migration_info)
    set_capabilities = _blocking(AsyncMachine.set_capabilities)
    set_parameters = _blocking(AsyncMachine.set_parameters)
    incoming = _blocking(AsyncMachine.incoming)
    read_memory = _blocking(AsyncMachine.read_memory)
    save_memory = _blocking(AsyncMachine.save_memory)


class RestoredMachine(Machine):
    """Blocking twin of :class:`postcopy.client.RestoredMachine`."""

    restored = _blocking(AsyncRestoredMachine.restored)


def restore(path: str | Path, **options: Unpack[RestoreOptions]) -> RestoredMachine:
    """As :func:`postcopy.client.restore`."""
    return RestoredMachine(_wait(_opened(restore_asynchronously(path, **options))))


def measure_link(uri: str, **options: "Unpack[LinkOptions]") -> "LinkBench":
    """As :func:`postcopy.measure_link`."""
    from postcopy.bench import link_bench  # it needs numpy, which takes long to import

    return _wait(link_bench.measure_link(uri, **options))


async def _opened(opening: AwaitableContext[C]) -> C:
    return await opening


def _iterate(looks: AsyncGenerator[Progress, None]) -> Iterator[Progress]:
    try:
        while (progress := _wait(_next(looks))) is not None:
            yield progress
    finally:
        _wait(looks.aclose())


async def _next(looks: AsyncGenerator[Progress, None]) -> Progress | None:
    return await anext(looks, None)
