"""A client's view of one outgoing migration."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal

from postcopy.client.credentials import Credentials
from postcopy.client.deadline import Deadline, DeadlineJudge, Judgement
from postcopy.client.explain import explain
from postcopy.client.progress import STOPPED, Phase, Progress, ProgressTracker, status_of
from postcopy.client.qmp import QmpConnection
from postcopy.client.reconnect import Retries, bring_together, settle_if_arrived
from postcopy.client.result import Result
from postcopy.client.status_help import UNCERTAIN, how_to_recover
from postcopy.errors import (
    ChannelBroken,
    MigrationCancelled,
    MigrationFailed,
    NeedsRecovery,
    PostcopyError,
    Refused,
    WrongState,
)
from postcopy.status import Status

Postcopy = Literal["now", "first-round", "manual"] | float | None
"""When to switch to postcopy: never, at once, when all memory has been sent once, when
:meth:`Migration.start_postcopy` says so, or after so many seconds."""

_INTERVAL_S: Final = 0.1
_DESTINATION_TIMEOUT_S: Final = 10.0
_NOT_AGAINST_IT: Final = frozenset({Status.NONE, Status.ACTIVE, Status.COMPLETED})
_DESTINATION_ENDS: Final = frozenset({"completed", "failed", "postcopy-paused"})


class Migration:
    """A migration that has begun; :meth:`postcopy.client.Machine.migrate` makes it.

    One task of the running event loop watches it from beginning to end; all methods belong to that loop.
    """

    def __init__(
        self,
        source: QmpConnection,
        destination: QmpConnection | None,
        postcopy: Postcopy,
        *,
        uri: str | None = None,
        auto_recover: float | None = None,
        notes: Sequence[str] = (),
        at_the_end: Callable[[], Awaitable[None]] | None = None,
        deadline: Deadline | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self.notes = tuple(notes)
        """Notes for the user: settings of the machine that do not apply to this migration."""
        self._at_the_end = at_the_end
        self._credentials = credentials or Credentials(None, None)
        self._deadline = deadline
        self._judge = None if deadline is None else DeadlineJudge(deadline)
        self._judgement: Judgement | None = None
        self._limit_before: int | None = None
        self._destination_is_gone = False
        self._source = source
        self._destination = destination
        self._postcopy = postcopy
        self._tracker = ProgressTracker(postcopy_planned=postcopy is not None)
        self._last = self._tracker.take({})
        self._listeners: set[asyncio.Queue[Progress | None]] = set()
        self._wake = asyncio.Event()
        self._uri = uri
        self._retries = Retries(auto_recover or 0.0)
        self._task = self._begin()

    def _begin(self) -> asyncio.Task[Result]:
        task = asyncio.create_task(self._watch(), name="migration")
        # Without this asyncio logs an exception that no caller has retrieved.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task

    @property
    def source_address(self) -> str:
        """Where the source's QMP monitor is, as the user gave it."""
        return self._source.address

    @property
    def status(self) -> Status | str:
        """The status in the source's last answer, at most a tenth of a second old.

        A ``str`` for a status that this client does not know.
        """
        return self._last.status

    @property
    def progress(self) -> Progress:
        """The last progress."""
        return self._last

    async def events(self) -> AsyncGenerator[Progress, None]:
        """Yield the progress, about ten times a second and at each change of status.

        Ends with the migration; :meth:`result` tells how.  Any number of tasks may iterate; each begins
        with the present state.
        """
        queue: asyncio.Queue[Progress | None] = asyncio.Queue()
        queue.put_nowait(self._last)
        if self._task.done():
            queue.put_nowait(None)
        self._listeners.add(queue)
        try:
            while (progress := await queue.get()) is not None:
                yield progress
        finally:
            self._listeners.discard(queue)

    async def result(self) -> Result:
        """Wait for the end.

        :raises MigrationCancelled: it was cancelled; the guest is at the source.
        :raises NeedsRecovery: it broke after the switchover; both sides wait.
        :raises MigrationFailed: it failed; the guest is at the source.
        :raises ChannelBroken: the source's monitor is gone; the state of the guest is unknown.
        """
        return await asyncio.shield(self._task)

    async def start_postcopy(self) -> None:
        """Switch over as soon as possible; harmless after the switchover.

        :raises Refused: the migration was begun without postcopy.
        """
        self._postcopy = "manual"
        await self._source.execute("migrate-start-postcopy")
        self._wake.set()

    async def cancel(self) -> None:
        """Cancel the migration; :meth:`result` tells whether it was cancelled.

        :raises Refused: after the switchover it cannot be cancelled.
        """
        await self._source.execute("migrate_cancel")
        self._wake.set()

    async def recover(self, uri: str | None = None) -> None:
        """Recover a broken postcopy; :meth:`events` and :meth:`result` then start again.

        :param uri: where the destination listens; None: at a free TCP port of its host.
        :raises WrongState: the migration is not paused.
        :raises Refused: the destination's machine is not known (``to=``), or one side refuses.
        """
        if not self._task.done() or self.progress.phase is not Phase.PAUSED:
            raise WrongState("the migration is not paused: there is nothing to recover")
        destination = self._driven()
        await self._credentials.use(self._source, destination)
        try:
            await bring_together(self._source, destination, uri)
        except BaseException:
            await self._credentials.take_back()
            raise
        self._uri = uri
        self._task = self._begin()

    def _driven(self) -> QmpConnection:
        if self._destination is None:
            raise Refused("the destination's monitor is not known; give it as to=")
        return self._destination

    # --- the watching task

    async def _watch(self) -> Result:
        pump = asyncio.create_task(self._pump(), name="migration-events")
        try:
            while True:
                answer = await self._until_stopped()
                theirs = await self._ask_destination(answer)
                await self._check_that_it_is_here(answer, theirs)
                try:
                    return self._outcome(answer, theirs)
                except NeedsRecovery as broken:
                    if not await self._has_arrived():
                        await self._recover_unasked(broken)
        finally:
            pump.cancel()
            await self._put_limit_back()
            if self._at_the_end is not None:
                await self._at_the_end()
            await self._credentials.take_back()
            for queue in self._listeners:
                queue.put_nowait(None)

    async def _pump(self) -> None:
        """Query at once after an event of the source."""
        with self._source.listen() as events:
            async for event in events:
                if event["event"].startswith("MIGRATION"):
                    self._wake.set()

    async def _until_stopped(self) -> Mapping[str, Any]:
        while True:
            self._wake.clear()
            answer: Mapping[str, Any] = await self._source.execute("query-migrate")
            progress = self._tracker.take(answer)
            if (
                progress.status is not Status.NONE
            ):  # NONE: the query came before the migration began
                self._publish(progress)
                if progress.phase is Phase.POSTCOPY:
                    self._retries.succeeded()
                if progress.phase in STOPPED:
                    return answer
                if self._postcopy_is_due(progress):
                    await self.start_postcopy()
                await self._keep_to_the_deadline(progress)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _INTERVAL_S)

    def _publish(self, progress: Progress) -> None:
        self._last = progress
        for queue in self._listeners:
            queue.put_nowait(progress)

    async def _keep_to_the_deadline(self, progress: Progress) -> None:
        judgement = None if self._judge is None else self._judge.judge(progress)
        if judgement is None:
            return
        assert self._deadline is not None
        self._judgement = judgement
        with contextlib.suppress(Refused):  # it goes over to the other side by itself just now
            match self._deadline.then:
                case "postcopy":
                    await self.start_postcopy()
                case "cancel":
                    await self.cancel()
                case "force":
                    await self._force(judgement.stop_ms)

    async def _force(self, stop_ms: int) -> None:
        parameters = await self._source.execute("query-migrate-parameters")
        await self._source.execute("migrate-set-parameters", {"downtime-limit": stop_ms})
        self._limit_before = parameters["downtime-limit"]

    async def _put_limit_back(self) -> None:
        before, self._limit_before = self._limit_before, None
        if before is not None:
            with contextlib.suppress(PostcopyError):  # its process has ended
                await self._source.execute("migrate-set-parameters", {"downtime-limit": before})

    def _postcopy_is_due(self, progress: Progress) -> bool:
        if progress.phase is not Phase.PRECOPY:
            return False
        match self._postcopy:
            case "first-round":
                return progress.round > 1
            case "now":
                return True
            case float() | int() as seconds:
                return progress.elapsed_ms >= seconds * 1000
        return False

    async def _ask_destination(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the destination's last answer, once it has ended too; empty if it cannot be queried."""
        theirs: Mapping[str, Any] = {}
        if self._destination is None:
            return theirs
        completed = answer["status"] == Status.COMPLETED.value
        with contextlib.suppress(TimeoutError, PostcopyError):
            async with asyncio.timeout(_DESTINATION_TIMEOUT_S if completed else 1):
                while theirs.get("status") not in _DESTINATION_ENDS:
                    theirs = await self._ask_it(self._destination)
                    await asyncio.sleep(_INTERVAL_S / 10)
        return theirs

    async def _ask_it(self, destination: QmpConnection) -> Mapping[str, Any]:
        try:
            answer: Mapping[str, Any] = await destination.execute("query-migrate")
        except ChannelBroken:
            self._destination_is_gone = True
            raise
        return answer

    async def _has_arrived(self) -> bool:
        """Whether the link broke after the last page, so that only the source has not completed."""
        if self._destination is None:
            return False
        try:
            return await settle_if_arrived(self._source, self._destination)
        except PostcopyError:
            return False

    async def _recover_unasked(self, broken: NeedsRecovery) -> None:
        """Return when both sides are connected again, or raise the reason why they are not."""
        while self._destination is not None and await self._retries.wait():
            try:
                await bring_together(self._source, self._destination, self._uri)
            except Refused as refusal:
                broken = NeedsRecovery(f"{broken} (last tried: {refusal})")
                broken.__cause__ = refusal
            else:
                return
        raise broken

    async def _check_that_it_is_here(
        self, source: Mapping[str, Any], destination: Mapping[str, Any]
    ) -> None:
        """Raise if the source has failed, and the destination may run the guest."""
        if status_of(source) is not Status.FAILED:
            return
        found = explain(await self._source.execute("query-status"), source)
        if found is UNCERTAIN:
            why = _reason(source, destination)
            raise NeedsRecovery(f"the migration failed: {why}; {found.meaning}: {found.next}")

    def _outcome(self, source: Mapping[str, Any], destination: Mapping[str, Any]) -> Result:
        status = status_of(source)
        why = _reason(source, destination)
        if status is Status.COMPLETED and _may_have_arrived(destination):
            return Result.of(source, destination)
        if status is Status.CANCELLED:
            why = (
                ""
                if self._judgement is None
                else f", since it would not end in time: {self._judgement.why}"
            )
            raise MigrationCancelled(
                f"the migration was cancelled{why}; the guest runs on at the source"
            )
        if status is Status.FAILED:
            raise MigrationFailed(f"the migration failed: {why}; the guest is at the source")
        there = None if self._destination is None else self._destination.address
        # A QEMU that is recovered without them goes on in the clear.
        recover = how_to_recover(self._source.address, there, self._credentials.typed)
        if self._destination_is_gone:
            raise NeedsRecovery(
                f"the migration broke after the switchover: {why}; the destination's monitor at {there} is "
                "gone: if its process has ended, the guest is lost; else recover it ("
                f"'{recover}')"
            )
        raise NeedsRecovery(
            f"the migration broke after the switchover: {why}; nothing is lost: type '{recover}'"
        )


def _may_have_arrived(destination: Mapping[str, Any]) -> bool:
    """False only for a status that this client knows and that is not compatible."""
    status = status_of(destination)
    return not isinstance(status, Status) or status in _NOT_AGAINST_IT


def _reason(source: Mapping[str, Any], destination: Mapping[str, Any]) -> str:
    ours, theirs = source.get("error-desc"), destination.get("error-desc")
    if theirs and theirs != ours:
        return f"{ours or 'no reason given'} (the destination says: {theirs})"
    return ours or "no reason given"
