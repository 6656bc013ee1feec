"""Whole journeys in which a kernel call fails; a program that runs those that it is told of.

Each ends with the guest whole and on exactly one side, or held by none in a way that a user can end; and
what passes is outlived without anybody's help.
"""

import contextlib
import errno
import faulthandler
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fakes.awakening import put_to_sleep, wake, woken, write_manifest
from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK, Journey, Side, hammer
from fakes.snapshots import Portrait, Remembering
from fakes.waiting import wait_until
from faults.failing_calls import BY_NAME, FROM_THEN_ON, FailingCalls
from faults.recovering import SETTLED, WITH_ROUNDS, Recovering
from machine.machines import wait_for_progress
from postcopy.errors import GuestError, PostcopyError
from postcopy.kernel.patience import PASSES
from postcopy.machine.workload import PAGE_BYTES
from postcopy.parameters import Capability
from postcopy.status import ENDED, Status

SETTLES_S = 30.0


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

    :ivar clean: all went on without help, and nothing was told.
    """

    def __init__(self, case: Case, calls: FailingCalls, folder: Path) -> None:
        self.case = case
        self.calls = calls
        self.folder = folder
        self.told: list[str] = []
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
        self.told += [side.error for side in sides if side.error]

    def journey(self, *arguments, **more) -> Journey:
        made = Journey.__new__(Journey)
        self.close.callback(Journey.close, made)
        made.__init__(*arguments, **more)
        return made

    def check_told(self) -> None:
        """What passes troubles nobody; what lasts and is told of is named."""
        if self.case.passes or not self.case.kind:
            assert not self.told, self.told
        for told in self.told:
            assert "internal error" not in told, told


def precopy(scene: Scene) -> None:
    trip = scene.journey(hammer(vcpus=2), parameters=QUICK)
    scene.arm()
    if scene.order(trip.migrate):
        settle(scene, trip)
    check_one_owner(scene, trip)


def postcopy(scene: Scene) -> None:
    _postcopy(scene, POSTCOPY)


def preempt(scene: Scene) -> None:
    _postcopy(scene, (*POSTCOPY, Capability.POSTCOPY_PREEMPT))


def _postcopy(scene: Scene, capabilities: Sequence[Capability]) -> None:
    trip = scene.journey(hammer(vcpus=2), capabilities=capabilities, parameters=WITH_ROUNDS)
    source = trip.source
    scene.arm()
    if scene.order(trip.migrate):
        wait_until(
            lambda: source.status in SETTLED or _rounds(source) > 1, SETTLES_S, "the first round"
        )
        scene.order(source.control.start_postcopy)
        switched = SETTLED | {Status.POSTCOPY_ACTIVE}
        wait_until(lambda: source.status in switched, SETTLES_S, "a switch")
        source.set(parameters={"max-postcopy-bandwidth": 0})
        settle(scene, trip)
    check_one_owner(scene, trip)


def _rounds(side: Side) -> int:
    ram = side.control.info().ram
    return 0 if ram is None else ram.dirty_sync_count


def recovery(scene: Scene) -> None:
    trip = _paused(scene)
    source, destination = trip.source, trip.destination
    source.set(parameters={"max-postcopy-bandwidth": 0})
    uri = f"unix:{scene.folder}/recovery"
    scene.arm()
    if scene.order(lambda: destination.control.recover(uri)):
        scene.order(lambda: source.control.migrate(uri, resume=True))
        settle(scene, trip)
    check_one_owner(scene, trip)


def lost(scene: Scene) -> None:
    """The source is gone for good; what it had is poisoned, and every page of it is counted."""
    trip = _paused(scene)
    side = trip.destination
    side.set(parameters={"x-on-loss": "poison"})
    missing = np.flatnonzero(~side.received())
    wanted = missing[trip.source.ram()[missing].any(axis=1)]
    scene.arm()
    is_done = scene.order(side.control.lost)
    scene.disarm()
    scene.check_told()
    if not is_done:
        assert side.status is Status.POSTCOPY_PAUSED
        side.control.lost()
    assert side.status is Status.FAILED
    assert f": {len(missing)} pages of block" in side.error, (side.error, len(missing))
    for page in wanted[:: max(1, len(wanted) // 50)].tolist():
        with suppress(GuestError):
            side.machine.read_memory(page * PAGE_BYTES, 8)
            raise AssertionError(f"page {page} is lost, and can be read")


def _paused(scene: Scene) -> Journey:
    """A postcopy of which both sides wait for a recovery, and nothing is under way."""
    parameters = NEVER_ENDS | {"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 256 << 10}
    trip = scene.journey(hammer(vcpus=2), capabilities=POSTCOPY, parameters=parameters)
    trip.migrate()
    with Recovering(trip, scene.folder) as broken:
        broken.until_postcopy()
        trip.source.control.pause()
        broken.until_settled()
    return trip


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
        source.machine.cont()
        owners = [source]
    assert len(owners) == 1, "both sides own the guest"
    (owner,) = owners
    other = destination if owner is source else source
    assert not other.machine.running
    if owner is destination:
        assert destination.status is Status.COMPLETED, destination.status
        assert source.status in {Status.COMPLETED, Status.POSTCOPY_PAUSED}, source.status
    trip.verify(owner)


def snapshot(scene: Scene) -> None:
    calls = scene.calls

    class Machine(Remembering):
        """What the test itself does to copy the memory must not fail."""

        def save_devices(self):
            calls.disarm()
            states = super().save_devices()
            calls.arm()
            return states

    portrait = scene.close.enter_context(Portrait(hammer(vcpus=2), kind=Machine))
    image = scene.folder / "image"
    scene.arm()
    if scene.order(lambda: portrait.begin(f"file:{image}")):
        portrait.side.until(*ENDED, timeout_s=SETTLES_S)
    scene.disarm(portrait.side)
    scene.check_told()
    is_there = portrait.side.status is Status.COMPLETED
    wait_until(
        lambda: [each.name for each in scene.folder.iterdir()] == ["image"] * is_there,
        SETTLES_S,
        lambda: f"a folder with the image alone: {list(scene.folder.iterdir())}",
    )
    if is_there:
        portrait.check_image(f"file:{image}")
    else:
        assert not scene.case.passes
    portrait.check_memory()


def restore(scene: Scene) -> None:
    _restore(scene, lazy=True)


def restore_eagerly(scene: Scene) -> None:
    _restore(scene, lazy=False)


def _restore(scene: Scene, *, lazy: bool) -> None:
    trip = scene.journey(hammer(vcpus=2))
    image = scene.folder / "image"
    put_to_sleep(trip, image)
    write_manifest(image)
    side = trip.destination
    scene.arm()
    if scene.order(lambda: wake(side, image, lazy=lazy)):
        side.until(*ENDED, Status.POSTCOPY_PAUSED, timeout_s=SETTLES_S)
    scene.disarm(side)
    scene.check_told()
    if side.status is Status.POSTCOPY_PAUSED:
        assert not scene.case.passes
        side.control.recover(f"file:{image}")
        wait_until(lambda: side.status is not Status.POSTCOPY_PAUSED, SETTLES_S, "a recovery")
    elif side.status is not Status.COMPLETED:
        assert not scene.case.passes
        if side.machine.owned:
            assert "are lost" in side.error, side.error
        else:
            assert not side.machine.running
        side = trip.new_destination()
        wake(side, image, lazy=lazy)
    woken(trip)


def reset(scene: Scene) -> None:
    trip = scene.journey(hammer(vcpus=2))
    side = trip.source
    resetting = side.control.resetting
    scene.arm()
    is_set = scene.order(resetting.set_point)
    if is_set:
        scene.calls.disarm()  # it reads the guest's memory
        wait_for_progress(side.machine, trip.workload)
        scene.calls.arm()
        for _ in range(3):
            scene.order(resetting.reset)
    scene.disarm()
    scene.check_told()
    if not side.machine.running:
        resetting.reset()  # as it says: it tries again
    if is_set:
        wait_for_progress(side.machine, trip.workload)
        side.machine.stop()
        resetting.reset()
        resetting.end()
        side.machine.cont()
    trip.verify(side)


JOURNEYS = {
    run.__name__: run
    for run in (
        *(precopy, postcopy, preempt, recovery, lost),
        *(snapshot, restore, restore_eagerly, reset),
    )
}


def main() -> None:
    """Run the cases of a file, and say of each on a line of its own how it went."""
    faulthandler.enable()
    calls = FailingCalls()
    for line in sys.stdin:
        case = Case(**json.loads(line))
        with tempfile.TemporaryDirectory() as folder:
            scene = Scene(case, calls, Path(folder))
            try:
                with scene.close:
                    JOURNEYS[case.journey](scene)
            except BaseException:
                calls.disarm()
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)  # whatever is left behind must not disturb the next
        answer = {"failed": calls.failed(), "seen": calls.seen(), "told": scene.told}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
