"""Journeys in which something breaks again and again, at random; each repeats from its seed.

One journey takes several breaks, one after the other, and ends with the oracle over every page.
``POSTCOPY_FAULTS`` says how many breaks there are, ``POSTCOPY_SEED`` where the seeds begin.
"""

import contextlib
import os
import random

from fakes.certificates import Certificates
from fakes.huge_pages import reserved
from fakes.pair import POSTCOPY, hammer
from fakes.waiting import wait_until
from faults.fault_channel import RECOVERY, Way
from faults.recovering import DEADLINE_S, SETTLED, WITH_ROUNDS, Recovering, broken_journey
from machine.drives import disk_workload, make_disk
from machine.machines import MIB
from postcopy.errors import PostcopyError
from postcopy.machine.memory_blocks import MemoryBlock
from postcopy.machine.workload import load
from postcopy.parameters import Capability
from postcopy.status import Status

PER_TEST = 10
"""Breaks of one test, over as many journeys as it takes: some end with their first break."""
DEFAULT_FAULTS = 100
MOST_BREAKS = 5
"""In one journey, so that several are made, and broken before the switchover too."""

HUGE = {
    "huge_pages": True,
    "workload": hammer(64, fill_kib=16 << 10),
    "parameters": WITH_ROUNDS | {"max-postcopy-bandwidth": 16 << 20},
}
PREEMPT = {"capabilities": (*POSTCOPY, Capability.POSTCOPY_PREEMPT)}
DRIVE = {"workload": disk_workload(vcpus=2, delay_cycles=0)}
MIXED = {
    "blocks": (MemoryBlock("fast", 16 * MIB, 2 * MIB), MemoryBlock("big", 48 * MIB)),
    "workload": load("hammer", 64 * MIB, fill_bytes=24 * MIB, hot_bytes=24 * MIB),
    "parameters": HUGE["parameters"],
}
"""A block of each page size, and the guest writes to both."""
TLS = ("tls", "tls-preempt")
"""The folder of certificates is made for each test."""
VARIANTS = {
    "plain": {},
    "preempt": PREEMPT,
    "drive": DRIVE,
    "huge": HUGE,
    "huge-preempt": HUGE | PREEMPT,
    "mixed": MIXED,
    "mixed-preempt": MIXED | PREEMPT,
    "tls": {},
    "tls-preempt": PREEMPT,
}
_SMALL = ("plain", "preempt", "drive")
TURNS = (*_SMALL, "mixed", "huge", *_SMALL, "mixed-preempt", "huge-preempt")


def faults():
    """How many breaks of each kind are asked for."""
    return int(os.environ.get("POSTCOPY_FAULTS", DEFAULT_FAULTS))


def tests():
    """A seed and its variant for each test that it takes."""
    first = int(os.environ.get("POSTCOPY_SEED", "1"))
    count = -(-faults() // PER_TEST)
    return [(seed, variant_of(seed)) for seed in range(first, first + count)]


def tls_tests():
    """As :func:`tests`, a fifth of them: what differs is how the channels break."""
    found = tests()
    return [(seed, TLS[seed % 2]) for seed, _ in found[: -(-len(found) // 5)]]


def variant_of(seed):
    """Pages of 2 MiB are slow, and have fewer cases."""
    return TURNS[seed % len(TURNS)]


def host_pages(variant):
    """What has to be reserved of the host's memory meanwhile; skips where it has none to give."""
    needs_pool = variant.startswith(("huge", "mixed"))
    return reserved(HUGE_PAGES) if needs_pool else contextlib.nullcontext()


def say_how_to_repeat(seed):
    """Shown with a failure."""
    print(f"POSTCOPY_SEED={seed} POSTCOPY_FAULTS={PER_TEST} repeats this one")  # noqa: T201


def cuts(journey, folder, seed, variant="plain"):
    """Cut, or lame, the link at random places, in the stream, its answers and the recoveries."""
    _storm(_cut_one, journey, folder, random.Random(seed), variant)


def kills(journey, folder, seed, variant="plain"):
    """Kill the engine of either side, or both, at random moments; the links live on."""
    _storm(_kill_one, journey, folder, random.Random(seed), variant)


def _storm(one, journey, folder, rng, variant):
    left, number = PER_TEST, 0
    while left > 0:
        number += 1
        here = folder / str(number)
        here.mkdir()
        drive = make_disk(here / "disk") if variant == "drive" else None
        made = {"parameters": WITH_ROUNDS, "drive": drive} | VARIANTS[variant]
        if variant in TLS:
            made["tls"] = Certificates(here / "certificates").host()
        trip = broken_journey(journey, **made)
        with contextlib.closing(trip), Recovering(trip, here) as broken:
            left -= one(rng, broken, min(left, MOST_BREAKS))


def begin(rng, broken):
    """In postcopy, or about to be."""
    channel = broken.start()
    if rng.random() < 0.5:
        broken.source.wait_rounds(1)
    return channel


def end(broken):
    """Let it come to its end undisturbed: one owner, every page right."""
    broken.hurry()
    owner = broken.source
    if broken.source.status is Status.FAILED and broken.source.machine.owned:
        wait_until(lambda: broken.destination.status is Status.FAILED, DEADLINE_S)
    elif broken.destination.status is Status.FAILED:
        broken.source.machine.cont()  # nobody could know, but a user sees both
    else:
        broken.recover()
        owner = broken.destination
    broken.verify(owner)


def _cut_one(rng, broken, most):
    """One journey; return how often it was broken."""
    channel, breaks = begin(rng, broken), 0
    if rng.random() < 0.25:
        _cut_anywhere(rng, channel)  # so early that it may be before the switchover
    broken.switch()
    broken.source.until(Status.POSTCOPY_DEVICE, Status.POSTCOPY_ACTIVE, *SETTLED)
    while breaks < most and broken.source.status is not Status.FAILED:
        break_link(rng, broken, channel)
        breaks += 1
        broken.until_settled()
        if broken.destination.status in {Status.COMPLETED, Status.FAILED}:
            break
        channel = broken.channel(broken.meet_again(anywhere(rng)))
        if rng.random() < 0.5:
            _cut_anywhere(rng, channel)
        broken.source.control.migrate(channel.uri, resume=True)
    broken.source.until(Status.POSTCOPY_ACTIVE, *SETTLED)
    end(broken)
    return max(breaks, 1)


def _kill_one(rng, broken, most):
    """One journey; return how many engines were killed."""
    begin(rng, broken)
    broken.switch()
    if rng.random() < 0.75:
        for side in (broken.source, broken.destination):
            side.until(Status.POSTCOPY_ACTIVE, *SETTLED)
    killed = 0
    while killed < most:
        progress(rng, broken)
        sides = rng.choice([[0], [1], [0, 1], [1, 0]])
        killed += kill([(broken.source, broken.destination)[side] for side in sides])
        if broken.settle_or_go_on():
            continue
        if broken.destination.status in {Status.COMPLETED, Status.FAILED}:
            break
        try:
            broken.resume(anywhere(rng))
        except PostcopyError:
            continue  # its successor is not there yet; it will be recovered all the same
    end(broken)
    return killed


def anywhere(rng):
    return rng.choice([None, "tcp:127.0.0.1:0"])


def _cut_anywhere(rng, channel):
    if rng.random() < 0.5:
        channel.cut(rng.choice(RECOVERY), at=rng.choice([None, 0, 1]))
    else:
        channel.cut(rng.randrange(200_000), rng.choice(list(Way)))


def break_link(rng, broken, channel):
    """Break it now, or let it break a little later."""
    wait_until(
        lambda: channel.connections or broken.source.status in SETTLED, DEADLINE_S, "nobody came"
    )
    if rng.random() < 0.5 and channel.connections:
        way = rng.choice(list(Way))
        so_far = len(channel.recorded(way))
        channel.cut(so_far + rng.randrange(50_000 if way is Way.UP else 500), way)
        progress(rng, broken)
    if rng.random() < 0.3:
        channel.stall_now()  # what is under way is lost with the link
    channel.break_all()


def progress(rng, broken):
    """Let some pages, at random, go over."""
    control = broken.source.control
    before = control.info().ram
    if before is None:
        return
    goal = before.transferred + rng.randrange(100_000)

    def gone_on():
        ram = control.info().ram
        settled = broken.source.status in SETTLED or broken.destination.status in SETTLED
        return settled or ram is None or ram.transferred >= goal

    wait_until(gone_on, DEADLINE_S, "nothing goes over")


def kill(sides):
    """Kill their engines, where one is at work; return how many, when that has been noticed."""
    killed = []
    for side in sides:
        engine = side.engine
        if engine is not None and side.status not in {Status.COMPLETED, Status.FAILED}:
            engine.kill()
            killed.append((side, engine))
    for side, engine in killed:
        wait_until(lambda s=side, e=engine: s.engine is not e, DEADLINE_S, "nobody noticed")
    return len(killed)


HUGE_PAGES = 80
"""Two guests of 64 MiB, and what of the journey before has not been given back yet."""
