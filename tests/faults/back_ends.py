"""Links, engines and back ends end at random while four vCPUs and a back end write.

One journey of a guest with a disk by vhost-user takes up to five breaks, as :mod:`faults.storm` makes them,
over one of the kinds of memory.
"""

import contextlib
import random
import signal

from fakes.huge_pages import reserved
from fakes.pair import POSTCOPY
from fakes.vhost_back_end import DiskOfJourney
from faults import storm
from faults.recovering import SETTLED, WITH_ROUNDS, Recovering
from journeys.test_memory_kinds import HUGE_PAGES, KINDS, MEMORY_BYTES
from machine.drives import disk_workload
from postcopy.errors import PostcopyError
from postcopy.parameters import Capability
from postcopy.status import Status

HARMS = ("link", "source", "destination", "back end")


def back_ends(journey, folder, seed, _variant=""):
    """Break one journey; its end is the oracle over every page, block and request."""
    rng = random.Random(seed)
    memory = list(KINDS)[seed % len(KINDS)]
    capabilities = [*POSTCOPY, *([Capability.POSTCOPY_PREEMPT] if rng.random() < 0.3 else [])]
    with contextlib.ExitStack() as stack:
        if pages := HUGE_PAGES.get(memory):
            stack.enter_context(reserved(2 * pages))
        disk = DiskOfJourney(stack, folder, rng.choice(["ours", "qemu"]))
        trip = journey(
            disk_workload(vcpus=4, delay_cycles=0, memory_bytes=MEMORY_BYTES),
            drive=disk.path,
            back_ends=[each.path for each in disk.back_ends],
            capabilities=capabilities,
            parameters=WITH_ROUNDS | ({"max-postcopy-bandwidth": 16 << 20} if pages else {}),
            **KINDS[memory],
        )
        stack.callback(trip.close)  # before the pages of 2 MiB are given back
        with Recovering(trip, folder) as broken:
            _one(rng, broken, disk)


def _one(rng, broken, disk):
    channel, done = storm.begin(rng, broken), []
    if rng.random() < 0.25:
        disk.kill(rng.randrange(2))
    broken.switch()
    if rng.random() < 0.75:
        broken.source.until(Status.POSTCOPY_ACTIVE, *SETTLED)
    for _ in range(storm.MOST_BREAKS):
        storm.progress(rng, broken)
        harms = rng.sample(HARMS, rng.choice([1, 1, 2]))
        done.append(f"{broken.destination.status.value}: {' and '.join(harms)}")
        _break(rng, broken, disk, channel, harms)
        if broken.settle_or_go_on():
            continue
        if broken.destination.status in {Status.COMPLETED, Status.FAILED}:
            break
        with contextlib.suppress(PostcopyError):  # it is recovered later
            channel = broken.resume(storm.anywhere(rng))
    print(done, broken.story())  # noqa: T201
    storm.end(broken)


def _break(rng, broken, disk, channel, harms):
    """One right after the other; the next back end comes at once, or when all has settled."""
    dead = None
    for harm in harms:
        if harm == "link":
            channel.break_all()
        elif harm == "back end":
            dead = rng.choice([0, 1, 1, 1])
            disk.back_ends[dead].end(signal.SIGKILL)
        else:
            storm.kill([getattr(broken, harm)])
    if dead is not None:
        if rng.random() < 0.5:
            broken.settle_or_go_on()
        disk.replace(dead)
