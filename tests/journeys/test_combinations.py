"""A guest with each back end and each kind of memory makes every journey; docs/vhost_user.md has the table.

One guest goes through all of them, and after each its memory and its device are looked at.
"""

import contextlib
import inspect
import shutil
import sys
from pathlib import Path

import pytest

from fakes import combinations
from fakes.awakening import wake, woken
from fakes.pair import POSTCOPY, QUICK, TRICKLE
from fakes.snapshots import AS_A_SNAPSHOT, Remembering
from fakes.testpmd import NetworkOfJourney
from fakes.vhost_back_end import DiskOfJourney
from journeys import test_memory_kinds
from journeys.test_memory_kinds import HUGE_PAGES, KINDS, MEMORY_BYTES, pause_and_recover
from machine.drives import disk_workload
from postcopy.errors import WrongState
from postcopy.parameters import Capability
from postcopy.status import Status


class DiskThen(Remembering):
    """Keeps a copy of its disk of the moment at which its devices are saved."""

    disk = ""

    def save_devices(self):
        states = super().save_devices()
        if self.disk:
            shutil.copyfile(self.disk, f"{self.disk}.then")
        return states


class Disk(DiskOfJourney):
    """See :class:`NetworkOfJourney`; each of its back ends serves when it has a front end."""

    drive = property(lambda self: self.path)

    def workload(self, memory_bytes):
        return disk_workload(memory_bytes=memory_bytes, delay_cycles=0)

    def serve(self, number):
        pass

    def back_to_the_image(self):
        shutil.copyfile(f"{self.path}.then", self.path)


class Scene:
    """A guest with such memory and such a back end, and where it goes next."""

    def __init__(self, stack, journey, folder, memory, back_end):
        self.folder, self.at = folder, 0
        dpdk = back_end == "dpdk"
        self.device = NetworkOfJourney(stack, folder) if dpdk else Disk(stack, folder, back_end)
        self.trip = journey(
            self.device.workload(MEMORY_BYTES),
            kind=type("Machine", (DiskThen,), {"disk": self.device.drive}),
            drive=self.device.drive,
            back_ends=[each.path for each in self.device.back_ends],
            **KINDS[memory],
        )
        stack.callback(self.trip.close)

    def go_to_the_next(self):
        """The back end of the destination serves from now on."""
        self.at = not self.at
        self.device.serve(self.at)


@pytest.mark.kvm
@pytest.mark.userfaultfd
@pytest.mark.parametrize("back_end", list(combinations.BACK_ENDS)[1:])
@pytest.mark.parametrize("memory", KINDS)
def test_all_journeys(journey, huge_pages, tmp_path, memory, back_end):
    huge_pages(4 * HUGE_PAGES.get(memory, 0))  # those of machines before are given back late
    with contextlib.ExitStack() as stack:
        scene = Scene(stack, journey, tmp_path, memory, back_end)
        with pytest.raises(WrongState, match=combinations.RESET_REFUSED):
            scene.trip.source.control.resetting.set_point()
        precopy(scene)
        snapshot_and_lazy_restore(scene)
        postcopy_and_recovery(scene)
        preempt(scene)


def precopy(scene):
    trip = scene.trip
    trip.source.set(parameters=QUICK)
    trip.migrate()
    scene.go_to_the_next()
    trip.finish()
    trip.turn()


def snapshot_and_lazy_restore(scene):
    """The guest of the image, with a copy of its disk of that moment, wakes in the place of the other."""
    trip, image = scene.trip, scene.folder / "image"
    side = trip.source
    side.set([Capability.BACKGROUND_SNAPSHOT])
    side.control.migrate(f"file:{image}", overrides=AS_A_SNAPSHOT)
    side.wait(Status.COMPLETED)
    trip.verify(side)
    side.close()
    scene.device.back_to_the_image()
    scene.go_to_the_next()
    wake(trip.destination, image)
    woken(trip)
    trip.turn()


def postcopy_and_recovery(scene, *capabilities):
    """A postcopy that breaks; the back end that waits for pages dies before it is recovered."""
    trip = scene.trip
    for side in (trip.source, trip.destination):
        side.set([*POSTCOPY, *capabilities])
    trip.source.set(parameters=TRICKLE)
    trip.migrate()
    trip.source.control.start_postcopy()
    scene.go_to_the_next()
    trip.source.wait(Status.POSTCOPY_ACTIVE)
    pause_and_recover(trip, lambda: capabilities or scene.device.kill(scene.at))
    trip.finish()
    trip.turn()


def preempt(scene):
    postcopy_and_recovery(scene, Capability.POSTCOPY_PREEMPT)


def test_each_cell_of_the_table_has_a_test():
    """With each kind of memory, as its parameters say."""
    assert set(combinations.MEMORY) == set(KINDS)
    modules = {
        Path(each.__file__).name: each for each in (test_memory_kinds, sys.modules[__name__])
    }
    for cell in combinations.cells():
        file, name = cell.test.split("::")
        test = getattr(modules[file], name)
        assert {"kind", "memory"} & set(inspect.signature(test).parameters), cell


def test_the_manual_has_the_same_table():
    assert combinations.page(combinations.PAGE.read_text()) == combinations.PAGE.read_text(), (
        "docs/vhost_user.md is not current: run PYTHONPATH=tests python -m fakes.combinations"
    )
