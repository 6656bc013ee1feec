"""Whole journeys in which a kernel call fails; a program that runs those that it is told of.

Each ends with the guest whole and on exactly one side, or held by none in a way that a user can end; and
what passes is outlived without anybody's help.
"""

import faulthandler
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from fakes.awakening import put_to_sleep, wake, woken, write_manifest
from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK, Journey, Side
from fakes.snapshots import Portrait, Remembering
from fakes.transports import Exec, Pipe, Way
from fakes.waiting import wait_until
from faults.failing_calls import FailingCalls
from faults.failing_scene import (
    HUGE,
    SETTLES_S,
    Case,
    Scene,
    check_ended,
    check_one_owner,
    has_ended,
    settle,
    verify,
)
from faults.recovering import SETTLED, WITH_ROUNDS, Recovering
from machine.machines import wait_for_progress
from postcopy.errors import GuestError, PostcopyError
from postcopy.machine import oracle
from postcopy.parameters import Capability
from postcopy.status import ENDED, Status


def precopy(scene: Scene) -> None:
    _precopy(scene, QUICK)


def kvm_log(scene: Scene) -> None:
    """What is written is noted by KVM, in place of userfaultfd."""
    _precopy(scene, QUICK | {"x-dirty-tracking": "kvm"})


def _precopy(scene: Scene, parameters: Mapping[str, object]) -> None:
    trip = scene.journey(scene.workload(), parameters=parameters)
    scene.arm()
    if scene.order(trip.migrate):
        settle(scene, trip)
    check_one_owner(scene, trip)


def by_pipe(scene: Scene) -> None:
    """Both sides are given a descriptor, and nothing comes back."""
    _carried(scene, Pipe(scene.folder), ())


def by_command(scene: Scene) -> None:
    """The source's engine starts a command, and stays with that to its end."""
    _carried(scene, Exec(scene.folder), (Capability.RETURN_PATH,))


def _carried(scene: Scene, way: Way, capabilities: Sequence[Capability]) -> None:
    trip = scene.journey(scene.workload(), capabilities=capabilities, parameters=QUICK)
    scene.arm()
    if scene.order(lambda: way.carry(trip.source, trip.destination)):
        settle(scene, trip)
    check_one_owner(scene, trip)


def postcopy(scene: Scene) -> None:
    _postcopy(scene, POSTCOPY)


def preempt(scene: Scene) -> None:
    _postcopy(scene, (*POSTCOPY, Capability.POSTCOPY_PREEMPT))


def _postcopy(scene: Scene, capabilities: Sequence[Capability]) -> None:
    parameters = scene.pages_kept_back(WITH_ROUNDS)
    trip = scene.journey(scene.workload(), capabilities=capabilities, parameters=parameters)
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
    with suppress(PostcopyError):  # one who only asks may be told that there is no thread to answer
        if (ram := side.control.info().ram) is not None:
            return ram.dirty_sync_count
    return 0


def recovery(scene: Scene) -> None:
    _recover(scene, _paused(scene))


def succession(scene: Scene) -> None:
    """The engines of both sides die, and others are started in their place."""
    trip = _in_postcopy(scene)
    sides = (trip.source, trip.destination)
    engines = [side.engine for side in sides]
    scene.arm()
    for engine in engines:
        engine.kill()
    wait_until(
        lambda: all(side.status is Status.POSTCOPY_PAUSED for side in sides),
        SETTLES_S,
        lambda: f"both pause: {[(side.status.value, side.story()) for side in sides]}",
    )
    scene.excused = {side.error for side in sides}
    _recover(scene, trip)


def _recover(scene: Scene, trip: Journey) -> None:
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
    size = side.machine.regions()[0].page_size_bytes
    wanted = missing[trip.source.ram().reshape(-1, size)[missing].any(axis=1)]
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
            side.machine.read_memory(page * size, 8)
            raise AssertionError(f"page {page} is lost, and can be read")


def _paused(scene: Scene) -> Journey:
    """A postcopy of which both sides wait for a recovery, and nothing is under way."""
    trip = _in_postcopy(scene)
    trip.source.control.pause()
    Recovering(trip, scene.folder).until_settled()
    return trip


def _in_postcopy(scene: Scene) -> Journey:
    parameters = NEVER_ENDS | {"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 256 << 10}
    if scene.huge:
        parameters |= {"max-bandwidth": 16 << 20, "max-postcopy-bandwidth": 2 << 20}
    trip = scene.journey(scene.workload(), capabilities=POSTCOPY, parameters=parameters)
    trip.migrate()
    Recovering(trip, scene.folder).until_postcopy()
    return trip


def snapshot(scene: Scene) -> None:
    calls = scene.calls

    class Machine(Remembering):
        """What the test itself does to copy the memory must not fail."""

        def save_devices(self):
            calls.disarm()
            states = super().save_devices()
            calls.arm()
            return states

    portrait = Portrait(scene.workload(), kind=Machine, huge_pages=scene.huge)
    scene.close.enter_context(portrait)
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
    if has_ended(portrait.machine):
        check_ended(scene, portrait.machine)
        assert oracle.verify(portrait.machine.read_memory, portrait.workload).ok
    else:
        portrait.check_memory()


def restore(scene: Scene) -> None:
    _restore(scene, lazy=True)


def restore_eagerly(scene: Scene) -> None:
    _restore(scene, lazy=False)


def _restore(scene: Scene, *, lazy: bool) -> None:
    trip = scene.journey(scene.workload())
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
    if has_ended(side.machine):
        side.until(Status.COMPLETED, Status.FAILED)
        verify(scene, trip, side)
    else:
        woken(trip)


def reset(scene: Scene) -> None:
    trip = scene.journey(scene.workload())
    side = trip.source
    resetting = side.control.resetting
    scene.arm()
    is_set = scene.order(resetting.set_point)
    if is_set:
        scene.calls.disarm()  # it reads the guest's memory
        if not has_ended(side.machine):
            wait_for_progress(side.machine, trip.workload)
        scene.calls.arm()
        for _ in range(3):
            scene.order(resetting.reset)
    scene.disarm()
    scene.check_told()
    if is_set and not side.machine.running:
        resetting.reset()  # as it says: it tries again
    if is_set:
        wait_for_progress(side.machine, trip.workload)
        side.machine.stop()
        resetting.reset()
        resetting.end()
        side.machine.cont()
    verify(scene, trip, side)


_ANY_PAGES = (precopy, postcopy, preempt, recovery, lost, snapshot, restore, restore_eagerly, reset)
JOURNEYS: dict[str, Callable[[Scene], None]] = {
    **{run.__name__: run for run in (*_ANY_PAGES, kvm_log, by_pipe, by_command, succession)},
    **{run.__name__ + HUGE: run for run in _ANY_PAGES},
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
