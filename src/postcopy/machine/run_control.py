"""Whether the guest runs.

Two parties stop and start a machine: its user (``stop``, ``cont``) and an engine that moves it
(``pause``, ``resume``).  An engine's pause comes on top of what the user wants and goes back to it.
Whether the guest may run here at all is decided by its :class:`~postcopy.ownership.Ownership`.
"""

import enum
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from postcopy.errors import GuestError, WrongState
from postcopy.machine.cpu import Exit, ExitReason
from postcopy.machine.vcpu import Runner, Vcpu, park_all
from postcopy.ownership import Move, Owner, Ownership


class RunState(enum.StrEnum):
    """QEMU's ``RunState`` (``qapi/run-state.json``), as far as a machine here has it.

    The values are what QMP, HMP and the stream's ``globalstate`` section say.
    """

    PRELAUNCH = "prelaunch"  # made, never started
    RUNNING = "running"
    PAUSED = "paused"  # by the user
    INMIGRATE = "inmigrate"  # waits for a guest to come
    FINISH_MIGRATE = "finish-migrate"  # stopped by a migration that is about to end
    POSTMIGRATE = "postmigrate"  # its guest has gone elsewhere
    INTERNAL_ERROR = "internal-error"  # a vCPU cannot go on
    SHUTDOWN = "shutdown"  # the guest has switched itself off

    @classmethod
    def of_stream(cls, name: str) -> "RunState":
        """What a stream says; a state that only QEMU has (such as suspended): it was not running."""
        return cls(name) if name in set(cls) else cls.PAUSED

    @property
    def needs_reset(self) -> bool:
        """Whether the guest has ended: nothing to let run."""
        return self in {RunState.INTERNAL_ERROR, RunState.SHUTDOWN}


OnEvent = Callable[[str, Mapping[str, Any]], None]

PARK_TIMEOUT_S = 5.0
"""Far more than a vCPU needs on a busy host, and what a monitor's user may be made to wait."""


class RunControl:
    """The run state of one machine.

    Invariant: vCPUs are wanted only while the state is ``RUNNING``, and it is ``RUNNING`` only
    while the table of ownership allows it.  Starts and stops keep to an order of their own
    (``_order``); the state has a lock that is never held while waiting, because the vCPUs' threads
    take it too.

    :param runners: the vCPUs, and the threads of devices.
    :param on_event: gets QEMU's ``STOP``, ``RESUME``, ``SHUTDOWN`` and ``GUEST_PANICKED``, in the
        order of what happened; may come on any thread and must not wait for the machine.
    :param park_timeout_s: how long a stop may take before it is given up and taken back.
    """

    def __init__(
        self, runners: Sequence[Runner], on_event: OnEvent, park_timeout_s: float = PARK_TIMEOUT_S
    ) -> None:
        self._runners = runners
        self._park_timeout_s = park_timeout_s
        self._on_event = on_event
        self._order = threading.Lock()
        self._lock = threading.RLock()
        self._state = RunState.PRELAUNCH
        self.ownership = Ownership()
        self._interrupted: RunState | None = None  # what the engine's pause came on top of
        self._started = False
        self._autostart = True
        self.failure: GuestError | None = None
        self.exit_code: int | None = None

    @property
    def state(self) -> RunState:
        """What the machine is doing now."""
        return self._state

    @property
    def state_to_move(self) -> RunState:
        """What the guest does apart from its migration: what its destination must know."""
        return self._interrupted or self._state

    def start(self, prepare: Callable[[], None], *, paused: bool, incoming: bool) -> None:
        """The machine's first start.

        :param prepare: puts memory and vCPUs in order, before anything runs.
        :raises WrongState: it has been started before.
        """
        with self._order:
            if self._started:
                raise WrongState(f"the machine has been started; it is {self._state.value}")
            prepare()
            self._started = True
            self._autostart = not paused
            if incoming:
                self.ownership.move(Move.BEGIN)
                self._become(RunState.INMIGRATE)
            elif not paused:
                self._go()

    def stop(self) -> None:
        """The user's stop; where the guest is not running it says what shall be later.

        :raises GuestError: a vCPU cannot be stopped now; the guest runs on.
        """
        with self._order:
            if self._state is RunState.INMIGRATE:
                self._autostart = False
            elif self._interrupted is RunState.RUNNING:
                self._interrupted = RunState.PAUSED
            elif self._state is RunState.RUNNING:
                self._halt(RunState.PAUSED)

    def cont(self) -> None:
        """The user's cont.

        :raises WrongState: the guest is elsewhere, has ended, or is just being moved.
        """
        with self._order:
            if self._state is RunState.INMIGRATE:
                self._autostart = True
                return
            if self.ownership.move(Move.CONT) in {Owner.UNKNOWN, Owner.SAVED}:
                self._taken_back()
            if self._state.needs_reset:
                raise WrongState("Resetting the Virtual Machine is required")
            if self._state is RunState.FINISH_MIGRATE:
                raise WrongState("Migration is not finalized yet")
            if self._state is RunState.POSTMIGRATE:
                self._interrupted = None
            self._go()

    def pause(self, *, to_move: bool = False) -> None:
        """An engine's stop: park the vCPUs, and remember what the guest was doing.

        :param to_move: for the switchover of a migration.
        :raises GuestError: a vCPU cannot be stopped now; the guest runs on.
        :raises WrongState: ``to_move``, and the migration has been cancelled.
        """
        stopped = {RunState.FINISH_MIGRATE, RunState.INMIGRATE, RunState.POSTMIGRATE}
        with self._order:
            if to_move:
                self.ownership.check(Move.STOP)
            if self._state not in stopped:
                self._park()
                with self._lock:
                    self._interrupted = self._state
                    self._become(RunState.FINISH_MIGRATE)
            if to_move:
                self.ownership.move(Move.STOP)

    def resume(self, arrival: int | None = None) -> None:
        """An engine's start: go back to what the guest was doing, here or where it came from.

        :param arrival: which guest was awaited when this one was loaded.
        :raises WrongState: the guest is elsewhere.
        :raises GuestError: the guest cannot run.
        """
        with self._order:
            if self._state is RunState.INMIGRATE:
                self.ownership.move(Move.ARRIVE, arrival=arrival)
            if not self.ownership.may_run:
                self.ownership.check(Move.CONT)  # the same rule, and the same reasons
                raise WrongState("the guest must not run here yet: 'cont' takes it back")
            if self._state is RunState.INTERNAL_ERROR:
                raise self.failure or GuestError("the guest is in state internal-error")
            goal = self._interrupted or self._state
            if self._state is RunState.INMIGRATE and goal in {self._state, RunState.RUNNING}:
                goal = RunState.RUNNING if self._autostart else RunState.PAUSED
            self._interrupted = None
            if goal is RunState.RUNNING:
                self._go()
            else:
                self._become(goal)

    def arrive(self, state: RunState) -> None:
        """The guest that has come was doing this; it will again after :meth:`resume`."""
        with self._order:
            self._interrupted = state

    def go_back(self, state: RunState) -> None:
        """The guest is what it was at an earlier point of its life, when it was doing ``state``.

        A guest that ran until an engine's pause runs on afterwards, and one that the user has stopped stays
        stopped; one that has ended since, however it ended, does what it did then.
        """
        with self._order, self._lock:
            self.failure = None
            self.exit_code = None
            if self._interrupted not in {RunState.RUNNING, RunState.PAUSED}:
                self._interrupted = state

    def set_state(self, state: RunState) -> None:
        """Say what a guest that stands still is standing still for, such as ``POSTMIGRATE``.

        :raises WrongState: it runs, or shall be made to run this way.
        """
        with self._order:
            if RunState.RUNNING in {state, self._state}:
                raise WrongState(f"cannot go from {self._state.value} to {state.value} by name")
            self._become(state)

    def fail(self, reason: str) -> None:
        """The guest cannot go on.  Does not wait: allowed on a vCPU's own thread."""
        with self._lock:
            if self.failure is None:
                self.failure = GuestError(reason)
            self._end(RunState.INTERNAL_ERROR)

    def guest_shutdown(self, exit_code: int) -> None:
        """The guest has switched itself off.  Does not wait: called on a vCPU's own thread.

        :param exit_code: what it wrote to the exit port.
        """
        with self._lock:
            if not self._state.needs_reset:
                self.exit_code = exit_code
                self._on_event("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
                self._end(RunState.SHUTDOWN)

    def vcpu_ended(self, vcpu: Vcpu, exit_: Exit) -> None:
        """A vCPU cannot go on, and so the guest.  Called on the vCPU's thread."""
        reason = f"vCPU {vcpu.index} cannot go on: {exit_.detail}"
        with self._lock:
            if exit_.reason is ExitReason.SHUTDOWN:
                self._on_event("GUEST_PANICKED", {"action": "pause"})
            self.fail(reason)

    def close(self) -> None:
        """Park them all for good, without any event; what does not stop in time ends with its own close."""
        with self._order, suppress(GuestError):
            park_all(self._runners, self._park_timeout_s)

    def _taken_back(self) -> None:
        self._interrupted = None
        if self._state is RunState.FINISH_MIGRATE:
            self._become(RunState.PAUSED)

    def _go(self) -> None:
        with self._lock:
            if self._state is RunState.RUNNING:
                return
            self._state = RunState.RUNNING
            self._on_event("RESUME", {})
            # Under the lock: a guest that ends at once must find its other vCPUs wanted already,
            # or they would not be stopped again.
            for runner in self._runners:
                runner.want()

    def _park(self) -> None:
        try:
            park_all(self._runners, self._park_timeout_s)
        except GuestError:
            with self._lock:
                if self._state is RunState.RUNNING:  # as before the order
                    for runner in self._runners:
                        runner.want()
            raise

    def _halt(self, state: RunState) -> None:
        self._park()
        with self._lock:
            if self._state is RunState.RUNNING:  # else the guest has ended meanwhile
                self._become(state)

    def _end(self, state: RunState) -> None:
        for runner in self._runners:
            runner.unwant()
        if self._interrupted is not None:
            # It ended while an engine was stopping it: that is what moves with it.
            self._interrupted = state
        else:
            self._become(state)

    def _become(self, state: RunState) -> None:
        with self._lock:
            was_running = self._state is RunState.RUNNING
            self._state = state
            if was_running:
                self._on_event("STOP", {})
