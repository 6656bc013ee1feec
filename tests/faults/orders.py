"""Every order of a user at every step of every journey: the guest has exactly one owner afterwards.

One case: an engine comes to a named step and stands still there; a user gives an order; something may
break; the engine goes on.  When both sides have settled the case ends as a user would end it (recover
what is paused, ``cont`` where the destination has failed), and with the oracle over all memory.
"""

import contextlib
import itertools
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fakes.awakening import AT_ONCE, put_to_sleep, wake, woken
from fakes.pair import DEADLINE_S, POSTCOPY, QUICK, Side
from fakes.waiting import holds_within, is_inside, wait_until
from faults import storm, trace_hooks
from faults.recovering import SETTLED, Recovering, broken_journey, small
from postcopy import trace
from postcopy.errors import PostcopyError
from postcopy.ownership import Owner
from postcopy.parameters import Capability
from postcopy.status import ENDED, Status

ANSWER_S = 20.0
"""Far more than an order takes on a busy host: none may wait for an engine that stands still."""

SOURCE, DESTINATION = "source", "destination"


def _snapshot(side: Side, folder: Path) -> None:
    side.control.set_capabilities({Capability.BACKGROUND_SNAPSHOT: True})
    side.control.migrate(f"file:{folder}/snapshot")


def _quit(side: Side, _folder: Path) -> None:
    """What ``quit`` and SIGTERM come to alike: see ``GuestProcess.end``."""
    side.control.close()
    side.control.kill_engines()
    side.close()


ORDERS: dict[str, Callable[[Side, Path], object]] = {
    "cancel": lambda side, _: side.control.cancel(),
    "stop": lambda side, _: side.machine.stop(),
    "cont": lambda side, _: side.machine.cont(),
    "migrate": lambda side, folder: side.control.migrate(f"unix:{folder}/nobody"),
    "resume": lambda side, folder: side.control.migrate(f"unix:{folder}/nobody", resume=True),
    "snapshot": _snapshot,
    "migrate-pause": lambda side, _: side.control.pause(),
    "migrate-recover": lambda side, folder: side.control.recover(f"unix:{folder}/elsewhere"),
    "migrate-incoming": lambda side, folder: side.control.incoming(f"unix:{folder}/incoming"),
    "migrate-continue": lambda side, _: side.control.continue_(Status.PRE_SWITCHOVER),
    "start-postcopy": lambda side, _: side.control.start_postcopy(),
    "capabilities": lambda side, _: side.control.set_capabilities({Capability.RETURN_PATH: True}),
    "parameters": lambda side, _: side.control.set_parameters({"downtime-limit": 400}),
    "x-migrate-lost": lambda side, _: side.control.lost(),
    "x-reset-point": lambda side, _: side.control.resetting.set_point(),
    "quit": _quit,
}
HARMS = ("none", "link", SOURCE, DESTINATION)
"""What breaks after the order: nothing, the link, or the engine of a side."""

BEFORE = "pre-switchover"
"""A step of a source that is told to pause there: it waits by itself."""

JOURNEYS = {
    "precopy": (
        *trace.SOURCE,
        *trace.SOURCE_PRECOPY,
        *trace.DESTINATION,
        *trace.DESTINATION_PRECOPY,
    ),
    "postcopy": (
        *trace.SOURCE_POSTCOPY,
        *trace.DESTINATION_POSTCOPY,
    ),
    "huge": (
        *trace.SOURCE_POSTCOPY,
        *trace.DESTINATION_POSTCOPY,
    ),
    "paused-precopy": (
        BEFORE,
        *trace.SOURCE_PRECOPY,
        *trace.DESTINATION_PRECOPY,
    ),
    "paused-postcopy": (
        BEFORE,
        *trace.SOURCE_POSTCOPY,
        *(step for step in trace.DESTINATION_POSTCOPY if step != "destination.advised"),
    ),
    "recovery": (
        *(step for step in trace.SOURCE_RECOVERY if step != "source.adopted"),
        *(step for step in trace.DESTINATION_RECOVERY if step != "destination.adopted"),
    ),
    "snapshot": trace.SNAPSHOT,
    "restore": trace.RESTORE_LAZY,
}


@dataclass(frozen=True)
class Case:
    """One order at one step."""

    journey: str
    step: str
    order: str
    to: str
    harm: str

    def __str__(self) -> str:
        return f"{self.journey}-{self.step}-{self.order}-to-{self.to}-harm-{self.harm}"


def all_cases() -> list[Case]:
    """The whole matrix, in a fixed order."""
    cases = []
    for journey, steps in JOURNEYS.items():
        sides = {"snapshot": (SOURCE,), "restore": (DESTINATION,)}.get(
            journey, (SOURCE, DESTINATION)
        )
        alone = len(sides) == 1
        harms = ("none", sides[0]) if alone else HARMS
        cases += [Case(journey, *rest) for rest in itertools.product(steps, ORDERS, sides, harms)]
    return cases


def sample(count: int, seed: int) -> list[Case]:
    """Some of the cases, spread over all journeys."""
    rng = random.Random(seed)
    by_journey = [[case for case in all_cases() if case.journey == journey] for journey in JOURNEYS]
    return [rng.choice(by_journey[number % len(by_journey)]) for number in range(count)]


CONVERGES = QUICK
"""Precopy ends, on a host that is busy too."""


class Stall:
    """Makes the first engine that comes to a step wait there."""

    def __init__(self, step: str, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(DEADLINE_S)
        self._path = path
        self._connection: socket.socket | None = None
        os.environ.update(trace_hooks.stall_at(step, path))

    def wait(self) -> None:
        """Until an engine stands still at the step."""
        self._connection = self._listener.accept()[0]
        self._stop_listening()

    def go_on(self) -> None:
        """Let it go on; harmless when it has."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        for name in trace_hooks.unsubscribed():
            os.environ.pop(name, None)
        self.go_on()
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listener.fileno() >= 0:
            self._listener.close()
            self._path.unlink()


def host_pages(case: Case) -> contextlib.AbstractContextManager[None]:
    """What a case needs of the host's pages of 2 MiB; skips where it has none to give."""
    return storm.host_pages(case.journey)


def run(case: Case, journey: Callable[..., object], folder: Path) -> None:
    """One case, from the beginning of its journey to the oracle."""
    stall = Stall(case.step, folder / "step")
    try:
        _RUNS.get(case.journey, _migration)(case, journey, folder, stall)
    finally:
        stall.close()


def _migration(case: Case, journey: Callable[..., object], folder: Path, stall: Stall) -> None:
    with _begun(case, journey, folder, stall) as broken:
        side = broken.source if case.to == SOURCE else broken.destination
        said = give_order(case, side, folder)
        _harm(case, broken)
        stall.go_on()
        if case.order == "quit":
            _settle_alone(broken, side, case)
            return
        with contextlib.suppress(PostcopyError):
            broken.hurry()
        _settle(broken, said, case)


@contextlib.contextmanager
def _begun(
    case: Case, journey: Callable[..., object], folder: Path, stall: Stall
) -> Iterator[Recovering]:
    postcopy = case.journey in {"postcopy", "huge", "paused-postcopy", "recovery"}
    capabilities = (*(POSTCOPY if postcopy else ()), *_PAUSES.get(case.journey, ()))
    more = {} if postcopy else {"parameters": CONVERGES}
    if case.journey == "huge":
        more = dict(storm.HUGE)
    with Recovering(broken_journey(journey, capabilities=(), **more), folder) as broken:
        broken.source.set(capabilities)
        broken.destination.set(POSTCOPY if postcopy else ())
        channel = broken.start()
        if case.journey in {"postcopy", "huge", "paused-postcopy"}:
            broken.switch()
        if case.journey in _PAUSES:
            broken.source.wait(Status.PRE_SWITCHOVER)
            if case.step == BEFORE:
                yield broken
                return
            _proceed(broken.source)
        if case.step in _AT_THE_END:
            broken.source.wait(Status.POSTCOPY_ACTIVE)
            broken.hurry()
        if case.journey == "recovery":
            broken.until_postcopy()
            channel.break_all()
            broken.until_settled()
            broken.resume()
        stall.wait()
        yield broken


_PAUSES = dict.fromkeys(
    ("paused-precopy", "paused-postcopy"), (Capability.PAUSE_BEFORE_SWITCHOVER,)
)
_AT_THE_END = frozenset(
    {
        "source.all-pushed",
        "source.pages-ended",
        "source.arrived",
        "destination.nothing-missing",
        "destination.pages-ended",
        "destination.unwatched",
        "destination.postcopy-shut-sent",
    }
)


def give_order(case: Case, side: Side, folder: Path) -> str:
    """Give the order; return what came of it.  It is answered, whatever stands still."""
    said: list[str] = []

    def order() -> None:
        try:
            ORDERS[case.order](side, folder)
            said.append("done")
        except PostcopyError as error:
            said.append(f"refused: {error}")

    thread = threading.Thread(target=order, name="order", daemon=True)
    thread.start()
    may_wait = case.order == "x-reset-point"
    waits = lambda: may_wait and is_inside(thread, "complete_first")  # noqa: E731
    holds_within(ANSWER_S, lambda: said or waits())
    if not said and may_wait:
        return "waits"  # for the restore that is under way: it is answered when that is over
    assert said, f"{case}: the order is not answered while {case.step} stands still"
    assert "internal error" not in said[0], (case, said)
    return said[0]


def _harm(case: Case, broken: Recovering) -> None:
    if case.order == "quit" and case.harm == case.to:
        return  # its engine has ended with it
    if case.harm == "link":
        broken.channels[-1].break_all()
    elif case.harm in {SOURCE, DESTINATION}:
        kill_engine(broken.source if case.harm == SOURCE else broken.destination)


def kill_engine(side: Side) -> None:
    """Kill the engine at work, if there is one."""
    engine = side.engine
    if engine is not None and side.status not in ENDED:
        engine.kill()
        wait_until(lambda: side.engine is not engine, DEADLINE_S, "nobody noticed")


def _settle(broken: Recovering, said: str, case: Case) -> None:
    """Bring it to an end as a user would, and look at whose the guest is."""
    source, destination = broken.source, broken.destination
    told = lambda: f"{case}: {said}; {broken.story()}; {owners(broken)}"  # noqa: E731
    _proceed(source)
    broken.until_settled()
    if destination.status is Status.POSTCOPY_PAUSED and source.status is Status.POSTCOPY_PAUSED:
        broken.recover()
    check_one_owner(broken, told)
    if source.machine.ownership.owner in {Owner.UNKNOWN, Owner.SAVED}:
        if destination.machine.owned:
            source.control.arrived()  # a user has seen the destination complete
        else:
            assert destination.status is Status.FAILED, told()
            source.machine.cont()
    owner = source if source.machine.owned else destination
    assert owner.machine.owned, told()
    owner.machine.cont()  # the order may have been to stop it
    broken.verify(owner)


def _settle_alone(broken: Recovering, gone: Side, case: Case) -> None:
    """One process has ended by its user's order: the other has the guest, or says that it has not."""
    source, destination = broken.source, broken.destination
    told = lambda: f"{case}; {broken.story()}; {owners(broken)}"  # noqa: E731
    left = destination if gone is source else source
    if left is source:
        _proceed(source)
    wait_until(lambda: left.status in SETTLED, DEADLINE_S, told)
    assert not (source.machine.owned and destination.machine.owned), told()
    owner = left.machine.ownership.owner
    if gone.machine.owned or owner in {Owner.TAKEN, Owner.MOVED}:
        assert not left.machine.owned, told()
    if left is source and owner is Owner.UNKNOWN:
        source.machine.cont()  # the advice: the destination, which has ended, does not run it
    if left.machine.owned and left.status is not Status.POSTCOPY_PAUSED:
        left.machine.cont()
        broken.trip.verify(left)


def _proceed(side: Side) -> None:
    if side.status is Status.PRE_SWITCHOVER:
        side.control.continue_(Status.PRE_SWITCHOVER)


def owners(broken: Recovering) -> tuple[str, str]:
    """Whose the guest is, as each side says."""
    sides = (broken.source, broken.destination)
    source, destination = (side.machine.ownership.owner.value for side in sides)
    return source, destination


def check_one_owner(broken: Recovering, told: Callable[[], str]) -> None:
    """At most one side runs the guest, and both sides say the same of it."""
    source, destination = broken.source.machine, broken.destination.machine
    assert not (source.running and destination.running), told()
    assert not (source.owned and destination.owned), told()
    if source.ownership.owner in {Owner.TAKEN, Owner.MOVED}:
        assert destination.owned, told()


def _snapshot_case(case: Case, journey: Callable[..., object], folder: Path, stall: Stall) -> None:
    trip = journey(small())
    side = trip.source
    side.set((Capability.BACKGROUND_SNAPSHOT,))
    side.control.migrate(f"file:{folder}/image")
    stall.wait()
    said = give_order(case, side, folder)
    if case.order == "quit":
        assert not list(folder.glob("image*partial*")), (case, said)  # all of an image, or nothing
        return
    if case.harm == SOURCE:
        kill_engine(side)
    stall.go_on()
    side.until(*ENDED)
    assert side.machine.ownership.owner is Owner.OURS, (case, said)
    _end_alone(trip, side)


def _restore_case(case: Case, journey: Callable[..., object], folder: Path, stall: Stall) -> None:
    trip = journey(small())
    path = put_to_sleep(trip, folder / "asleep")
    side = trip.destination
    side.set(parameters=AT_ONCE)
    wake(side, path)
    stall.wait()
    said = give_order(case, side, folder)
    if case.order == "quit":
        stall.close()
        trip.new_destination()  # the image is as good as before
        wake(trip.destination, path)
        woken(trip)
        return
    if case.harm == DESTINATION:
        kill_engine(side)
    stall.go_on()
    side.until(Status.COMPLETED, Status.FAILED, Status.CANCELLED)
    assert side.machine.ownership.owner is Owner.OURS, (case, said)
    assert trip.source.machine.ownership.owner is Owner.SAVED
    _end_alone(trip, side)


def _end_alone(trip: object, side: Side) -> None:
    with contextlib.suppress(PostcopyError):
        side.control.resetting.end()
    side.machine.cont()
    wait_until(lambda: side.machine.running, DEADLINE_S, "the guest runs")
    trip.verify(side)


_RUNS = {"snapshot": _snapshot_case, "restore": _restore_case}
