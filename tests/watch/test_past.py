"""What is kept of a run has a bound and reaches back to its beginning, whenever one comes to look."""

import asyncio
import dataclasses

import pytest

from fakes.watching import HEADER, samples
from postcopy.watch.past import Past, thinned
from postcopy.watch.server import SampleFeed

SAMPLE = samples()[1]


def run(count, changes=()):
    """Samples a second each; the status changes at some."""
    status = 0
    for number in range(count):
        status += number in changes
        yield dataclasses.replace(SAMPLE, t_ms=1000 * number, status=f"status-{status}")


def kept(count, most, changes=()):
    past = Past(most=most)
    for number, sample in enumerate(run(count, changes)):
        past.add(sample, b"%d" % number)
        assert len(past.since(0)) <= most + len(changes) + 1
    assert past.count == count
    return [int(each) for each in past.since(0)], past


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [0]),
        (4, [0, 1, 2, 3]),
        (5, [0, 1, 2, 3, 4]),
        (6, [0, 2, 4, 5]),
        (8, [0, 2, 4, 6, 7]),
        (9, [0, 2, 4, 6, 8]),
        (12, [0, 4, 8, 11]),
    ],
)
def test_a_run_that_lasts_is_kept_in_larger_steps(count, expected):
    # The first one is a change, too.
    assert kept(count, most=4)[0] == expected


def test_each_change_of_the_status_is_kept():
    found, past = kept(1000, most=10, changes=(333, 334, 801))
    assert {0, 333, 334, 801, 999} <= set(found)
    assert len(found) <= 15
    assert past.since(801)[0] == b"801"
    assert past.since(1000) == []


def test_statuses_that_change_without_end_have_a_bound():
    assert len(kept(3000, most=10, changes=range(3000))[0]) <= 1011


def test_the_bytes_have_a_bound():
    past = Past(most_bytes=1000)
    for sample in run(500):
        past.add(sample, bytes(100))
        assert sum(map(len, past.since(0))) <= 1000
    assert len(past.since(0)) >= 4


def test_one_sample_that_is_too_large_alone_is_kept():
    past = Past(most_bytes=10)
    for sample in run(3):
        past.add(sample, bytes(100))
    assert past.since(2) == [bytes(100)]


def test_a_report_has_the_whole_run():
    made = list(run(20_000))
    found = thinned(made)
    assert (found[0], found[-1]) == (made[0], made[-1])
    assert len(found) <= 7201
    assert thinned(made[:50]) == made[:50]


class Browser:
    """Does with the events what the page does."""

    def __init__(self):
        self.kept = []
        self.step = 1

    def take(self, event):
        lines = event.decode().splitlines()
        if lines[0] == "event: step":
            self.step = int(lines[1].removeprefix("data: "))
            last = self.kept[-1:]
            self.kept = [each for each in self.kept[:-1] if self.stays(each)] + last
        elif lines[0].startswith("id: "):
            if self.kept and not self.stays(self.kept[-1]):
                self.kept.pop()
            self.kept.append((int(lines[0][4:]), lines[1] == "event: change"))

    def stays(self, each):
        return each[1] or each[0] % self.step == 0


def test_who_comes_late_has_what_those_have_who_were_there():
    async def taken(feed, browser, events, number):
        while not browser.kept or browser.kept[-1][0] < number:
            browser.take(await anext(events))

    async def work():
        feed = SampleFeed(HEADER, Past(most=8))
        early, events = Browser(), feed.events(-1)
        for number, sample in enumerate(run(100, changes=(31, 77))):
            feed.add(sample)
            if number % 3 == 0:  # it may be slow, too
                await taken(feed, early, events, number)
        late, more = Browser(), feed.events(-1)
        await taken(feed, late, more, 99)
        assert late.kept == early.kept
        assert {0, 31, 77, 99} <= {number for number, _ in late.kept}
        await events.aclose()
        await more.aclose()

    asyncio.run(work())
