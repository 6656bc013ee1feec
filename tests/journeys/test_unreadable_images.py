"""An image that cannot be read any more under a running guest: its pages are lost by name, and no more."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fakes.awakening import AT_ONCE, TRICKLE, put_to_sleep, wake, write_manifest
from fakes.bad_sectors import BadSector
from fakes.pair import DEADLINE_S, idle
from machine.machines import wait_for_progress
from postcopy.channel.whole_file import partial_name
from postcopy.errors import GuestError
from postcopy.image.finalize import finalize
from postcopy.image.formats import open_image
from postcopy.image.options import ImageOptions, SnapshotTimings
from postcopy.machine.workload import PAGE_BYTES
from postcopy.status import ENDED, Status

RAM = "microvm.ram"
NAMED = re.compile(rf"block {RAM} from offset (0x\w+) on")
KINDS = ("mapped-ram", "mapped-ram with a manifest", "stream", "stream with a manifest", "chunks")
HARMS = ("cut off", "cut off in a page", "bad sector")


@dataclass(frozen=True)
class Victim:
    """A page that the guest does not touch by itself, and where it lies."""

    image: Path
    page: int
    file: Path
    offset: int

    def harm(self, how: str, sector: BadSector) -> None:
        if how == "bad sector":
            sector.put(self.file, self.offset, self.offset + PAGE_BYTES)
        else:
            os.truncate(self.file, self.offset + (100 if how == "cut off in a page" else 0))


def make_image(trip, path: Path, kind: str) -> Victim:
    if kind == "chunks":
        written = partial_name(path)
        put_to_sleep(trip, written, "stream")
        finalize(path, written, ImageOptions(compressed=True), SnapshotTimings(0.0))
    else:
        put_to_sleep(trip, path, kind.split(maxsplit=1)[0])
        if "manifest" in kind:
            write_manifest(path)
    return victim_of(path, kind)


def victim_of(path: Path, kind: str = "mapped-ram") -> Victim:
    with open_image(path) as image:
        page = int(np.flatnonzero(image.has_data(RAM))[-40])
        if kind == "chunks":
            (pack,) = (path.parent / "postcopy-chunks").glob("*.pack")
            return Victim(path, page, pack, pack.stat().st_size * 3 // 4)
        offset = path.read_bytes().index(image.read(RAM, page, 1).tobytes())
    return Victim(path, page, path, offset)


@pytest.fixture
def sector(tmp_path, monkeypatch):
    return BadSector(tmp_path, monkeypatch)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("kind", KINDS)
def test_pages_that_cannot_be_read_are_lost_and_the_guest_runs_on(
    journey, tmp_path, sector, kind, harm
):
    trip = journey(idle())
    trip.source.machine.stop()  # so each page is in a stream once
    victim = make_image(trip, tmp_path / "image", kind)
    truth = trip.source.ram()
    side = trip.destination
    side.set(parameters=TRICKLE)
    if kind == "mapped-ram" and harm == "bad sector":
        victim.harm(harm, sector)  # else the mapping can be read still
    wake(side, victim.image)
    side.wait(Status.POSTCOPY_ACTIVE)
    side.machine.cont()
    wait_for_progress(side.machine, trip.workload)  # it has what it needs
    missing = ~side.received()
    assert missing[victim.page]
    victim.harm(harm, sector)
    side.set(parameters=AT_ONCE)
    assert side.control.progress.wait(*ENDED, Status.POSTCOPY_PAUSED, timeout=DEADLINE_S) is (
        Status.FAILED
    )
    assert str(victim.file) in side.error
    assert "pages are lost" in side.error
    assert ("Input/output error" if harm == "bad sector" else "cut off") in side.error
    named = int(NAMED.search(side.error)[1], 16) // PAGE_BYTES
    machine = side.machine
    wait_for_progress(machine, trip.workload)
    assert is_lost(machine, named)
    around = list(range(victim.page - 64, victim.page))
    if kind == "chunks":  # two threads write a pack: which chunks lie past the cut is theirs to say
        around = np.flatnonzero(missing)[::16].tolist()
    good = [page for page in around if not is_lost(machine, page)]
    assert good
    for page in good:
        assert machine.read_memory(page * PAGE_BYTES, PAGE_BYTES) == truth[page].tobytes()
    if kind != "chunks":
        assert is_lost(machine, victim.page)


@pytest.mark.parametrize("harm", HARMS)
def test_a_reset_to_an_image_that_cannot_be_read_is_refused_and_can_be_tried_again(
    journey, tmp_path, sector, harm
):
    trip = journey(idle())
    trip.source.machine.stop()
    victim = make_image(trip, tmp_path / "image", "mapped-ram")
    truth = trip.source.ram()
    shutil.copy(victim.image, tmp_path / "whole")
    side = trip.destination
    wake(side, victim.image)
    side.wait(Status.COMPLETED)
    side.control.resetting.set_point(str(victim.image))
    side.machine.cont()
    wait_for_progress(side.machine, trip.workload)
    victim.harm(harm, sector)
    why = "Input/output error" if harm == "bad sector" else "cut off"
    with pytest.raises(GuestError, match=rf"{victim.image}: cannot be read: .*{why}"):
        side.control.resetting.reset()
    assert not side.machine.running
    sector.put(victim.file, 0, 0)
    with victim.image.open("r+b") as file:
        file.write((tmp_path / "whole").read_bytes())
    side.machine.stop()  # or it would write at once
    side.control.resetting.reset()
    assert (side.ram() == truth).all()


def is_lost(machine, page: int) -> bool:
    try:
        machine.read_memory(page * PAGE_BYTES, 8)
    except GuestError as error:
        return "is lost" in str(error)
    return False
