"""What the journeys of :mod:`faults.failing_journeys` share: a case, its scene, and how it ends."""

import contextlib
import errno
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from fakes.pair import Journey, Side, hammer
from fakes.waiting import wait_until
from faults.failing_calls import BY_NAME, FROM_THEN_ON, FailingCalls
from faults.recovering import SETTLED, Recovering
from postcopy.errors import PostcopyError, WrongState
from postcopy.kernel.patience import PASSES
from postcopy.machine.machine import Machine
from postcopy.machine.run_control import RunState
from postcopy.machine.workload import Workload
from postcopy.status import ENDED, Status

SETTLES_S = 30.0
ENDS_GUESTS = frozenset({"KVM_RUN", "KVM_SET_SIGNAL_MASK"})
"""A vCPU that cannot be run ends its guest, as in QEMU."""
HUGE = "_huge"
"""The end of the names of journeys of guests on pages of 2 MiB."""


@dataclass(frozen=True)
class Case:
    """One journey, with one failure.

    :ivar kind: of :data:`faults.failing_calls.KINDS`; "": calls are only counted.
    :ivar first: which call of that kind fails first.
    """

    journey: str
    kind: str = ""
    error: int = 0
    first: int = 1
    times: int = 1

    @property
    def passes(self) -> bool:
        """Whether the failure is one that passes."""
        return self.times != FROM_THEN_ON and self.error in PASSES and self.kind != "fsync"

    def __str__(self) -> str:
        if not self.kind:
            return f"{self.journey}: nothing fails"
        often = {1: "once", FROM_THEN_ON: "from then on"}.get(self.times, f"{self.times} times")
        name = errno.errorcode[self.error]
        return f"{self.journey}: {self.kind} number {self.first} fails with {name} {often}"


class Scene:
    """What a journey needs: the failing calls, a folder, and notes of what users were told.

    :ivar excused: what users are told of what the journey itself breaks.
    :ivar huge: the guest's memory is of pages of 2 MiB.
    """

    def __init__(self, case: Case, calls: FailingCalls, folder: Path) -> None:
        self.case = case
        self.calls = calls
        self.folder = folder
        self.huge = case.journey.endswith(HUGE)
        self.told: list[str] = []
        self.excused: set[str | None] = set()
        self.close = contextlib.ExitStack()

    def arm(self) -> None:
        kind = BY_NAME.get(self.case.kind)
        self.calls.set(kind, self.case.error, self.case.first, self.case.times)
        self.calls.arm()

    def order(self, call: Callable[[], object]) -> bool:
        """Order something; return whether that was taken."""
        try:
            call()
        except PostcopyError as error:
            self.told.append(str(error))
            return False
        return True

    def disarm(self, *sides: Side) -> None:
        """From here on all works again."""
        self.calls.disarm()
        self.told += [side.error for side in sides if side.error and side.error not in self.excused]

    def journey(self, *arguments, **more) -> Journey:
        made = Journey.__new__(Journey)
        self.close.callback(Journey.close, made)
        made.__init__(*arguments, huge_pages=self.huge, **more)
        return made

    def workload(self) -> Workload:
        """Of pages of 2 MiB a guest needs more, to have some left to wait for."""
        return hammer(64, 1, fill_kib=16 << 10) if self.huge else hammer(vcpus=2)

    def pages_kept_back(self, parameters: Mapping[str, object]) -> Mapping[str, object]:
        """Parameters for a push that takes a while, whatever the size of a page."""
        return parameters | {"max-postcopy-bandwidth": 4 << 20} if self.huge else parameters

    def check_told(self) -> None:
        """What passes troubles nobody; what lasts and is told of is named."""
        if self.case.passes or not self.case.kind:
            assert not self.told, self.told
        for told in self.told:
            assert "internal error" not in told, told


def settle(scene: Scene, trip: Journey) -> None:
    """Until neither side goes on by itself; a destination that nobody has called waits on."""
    sides = (trip.source, trip.destination)

    def settled() -> bool:
        source, destination = (side.status for side in sides)
        uncalled = source is Status.FAILED and destination is Status.SETUP
        return source in SETTLED and (destination in SETTLED or uncalled)

    wait_until(
        settled,
        SETTLES_S,
        lambda: f"settled: {[(side.status.value, side.error, side.story()) for side in sides]}",
    )


def check_one_owner(scene: Scene, trip: Journey) -> None:
    """The guest is whole on one side, after what a user would do about a pause."""
    source, destination = trip.source, trip.destination
    paused = Status.POSTCOPY_PAUSED in {source.status, destination.status}
    scene.disarm(source, destination)
    scene.check_told()
    if scene.case.passes:
        assert destination.status is Status.COMPLETED
    if paused and destination.status not in ENDED:
        again = scene.folder / "again"
        again.mkdir()
        with Recovering(trip, again) as broken:
            broken.recover()
            broken.until_settled()
    owners = [side for side in (source, destination) if side.machine.owned]
    if not owners:
        assert destination.status is Status.FAILED, (source.status, destination.status)
        assert not source.machine.running
        with suppress(WrongState) if has_ended(source.machine) else nullcontext():
            source.machine.cont()
        owners = [source]
    assert len(owners) == 1, "both sides own the guest"
    (owner,) = owners
    other = destination if owner is source else source
    assert not other.machine.running
    if owner is destination:
        assert destination.status is Status.COMPLETED, destination.status
        assert source.status in {Status.COMPLETED, Status.POSTCOPY_PAUSED}, source.status
    verify(scene, trip, owner)


def verify(scene: Scene, trip: Journey, owner: Side) -> None:
    """All of the guest's memory is right; and it works, unless its vCPUs could not be run."""
    if has_ended(owner.machine):
        check_ended(scene, owner.machine)
        trip.check_memory(owner.machine.read_memory)
    else:
        trip.verify(owner)


def has_ended(machine: Machine) -> bool:
    """Whether a vCPU could not be run any more."""
    return machine.run_state is RunState.INTERNAL_ERROR


def check_ended(scene: Scene, machine: Machine) -> None:
    """It has ended of the call that failed, and says so where it has."""
    assert not scene.case.passes
    assert scene.case.kind in ENDS_GUESTS, machine.failure
    assert machine.failure is None or scene.case.kind in str(machine.failure), machine.failure
