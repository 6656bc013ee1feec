"""Journeys in which something breaks again and again, at random; each repeats from its seed.

One journey takes several breaks, one after the other, and ends with the oracle over every page.
``POSTCOPY_FAULTS`` says how many breaks there are, ``POSTCOPY_SEED`` where the seeds begin.
"""

import os
import random

from fakes.waiting import wait_until
from faults.fault_channel import RECOVERY, Way
from faults.recovering import DEADLINE_S, SETTLED, Recovering, broken_journey
from postcopy.errors import PostcopyError
from postcopy.status import Status

PER_JOURNEY = 6
DEFAULT_FAULTS = 12


def faults():
    """How many breaks of each kind are asked for."""
    return int(os.environ.get("POSTCOPY_FAULTS", DEFAULT_FAULTS))


def seeds():
    """One seed for each journey that it takes."""
    first = int(os.environ.get("POSTCOPY_SEED", "1"))
    return range(first, first - (-faults() // PER_JOURNEY))


def say_how_to_repeat(seed):
    """Shown with a failure."""
    print(f"POSTCOPY_SEED={seed} POSTCOPY_FAULTS={PER_JOURNEY} repeats this one")  # noqa: T201


def begin(journey, folder, rng):
    """A journey in postcopy, or about to be."""
    broken = Recovering(broken_journey(journey), folder)
    channel = broken.start()
    if rng.random() < 0.5:
        broken.source.wait_rounds(1)
    return broken, channel


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


def cuts(journey, folder, seed):
    """Cut, or lame, the link at random places, in the stream, its answers and the recoveries."""
    rng = random.Random(seed)
    broken, channel = begin(journey, folder, rng)
    with broken:
        if rng.random() < 0.25:
            _cut_anywhere(rng, channel)  # so early that it may be before the switchover
        broken.switch()
        broken.source.control.progress.wait(
            Status.POSTCOPY_ACTIVE, *SETTLED, timeout=DEADLINE_S
        )  # fmt: skip
        for _ in range(PER_JOURNEY):
            if broken.source.status is Status.FAILED:
                break  # cut before the switchover: the guest has stayed
            _break_link(rng, broken, channel)
            broken.until_settled()
            if broken.destination.status in {Status.COMPLETED, Status.FAILED}:
                break
            channel = broken.channel(broken.listen_again(_anywhere(rng)))
            if rng.random() < 0.5:
                _cut_anywhere(rng, channel)
            broken.source.control.migrate(channel.uri, resume=True)
        broken.source.control.progress.wait(
            Status.POSTCOPY_ACTIVE, *SETTLED, timeout=DEADLINE_S
        )  # fmt: skip
        end(broken)


def kills(journey, folder, seed):
    """Kill the engine of either side, or both, at random moments; the links live on."""
    rng = random.Random(seed)
    broken, _ = begin(journey, folder, rng)
    with broken:
        if rng.random() < 0.75:
            broken.until_postcopy()
        else:
            broken.switch()
        for _ in range(PER_JOURNEY):
            _progress(rng, broken)
            for side in rng.choice([[0], [1], [0, 1], [1, 0]]):
                _kill((broken.source, broken.destination)[side])
            broken.until_settled()
            if broken.destination.status in {Status.COMPLETED, Status.FAILED}:
                break
            try:
                broken.resume(_anywhere(rng))
            except PostcopyError:
                continue  # its successor is not there yet; it will be recovered all the same
        end(broken)


def _anywhere(rng):
    return rng.choice([None, "tcp:127.0.0.1:0"])


def _cut_anywhere(rng, channel):
    if rng.random() < 0.5:
        channel.cut(rng.choice(RECOVERY), at=rng.choice([None, 0, 1]))
    else:
        channel.cut(rng.randrange(200_000), rng.choice(list(Way)))


def _break_link(rng, broken, channel):
    """Break it now, or let it break a little later."""
    wait_until(
        lambda: channel.connections or broken.source.status in SETTLED, DEADLINE_S, "nobody came"
    )
    if rng.random() < 0.5 and channel.connections:
        way = rng.choice(list(Way))
        so_far = len(channel.recorded(way))
        channel.cut(so_far + rng.randrange(50_000 if way is Way.UP else 500), way)
        _progress(rng, broken)
    if rng.random() < 0.3:
        channel.stall_now()  # what is under way is lost with the link
    channel.break_all()


def _progress(rng, broken):
    """Let some pages, at random, go over."""
    control = broken.source.control
    before = control.info().ram
    if before is None:
        return
    goal = before.transferred + rng.randrange(150_000)

    def gone_on():
        ram = control.info().ram
        settled = broken.source.status in SETTLED or broken.destination.status in SETTLED
        return settled or ram is None or ram.transferred >= goal

    wait_until(gone_on, DEADLINE_S, "nothing goes over")


def _kill(side):
    engine = side.control._engine
    if engine is not None and side.status not in {Status.COMPLETED, Status.FAILED}:
        engine.kill()
