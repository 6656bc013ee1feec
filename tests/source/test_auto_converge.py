"""When a guest that writes too fast is slowed down, and by how much: QEMU's rules."""

import pytest

from postcopy.errors import ChannelBroken
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.source.auto_converge import Convergence, next_percent

MIB = 1 << 20
AUTO, LIMIT = Capability.AUTO_CONVERGE, Capability.DIRTY_LIMIT


class Slowed:
    """Notes what is asked of it."""

    def __init__(self):
        self.percents = []
        self.limits = []

    def throttle(self, percent):
        self.percents.append(percent)

    def limit_dirty_rate(self, mebibytes, period_ms):
        self.limits.append((mebibytes, period_ms))


class Rounds:
    """Rounds of a second each."""

    def __init__(self, capability, guest=None, **parameters):
        self.guest = guest or Slowed()
        self.parameters = Parameters().with_changes(
            {name.replace("_", "-"): value for name, value in parameters.items()}
        )
        self.now = 0.0
        on = Capabilities(frozenset({capability} if capability else ()))
        self.judge = Convergence(self.guest, on, lambda: self.parameters, clock=lambda: self.now)

    def go(self, *rounds, seconds=1.0):
        for sent, written in rounds:
            self.now += seconds
            self.judge.round_ended(sent * MIB, written * MIB)
        return self.guest


def test_at_the_second_round_in_which_too_much_is_written_and_each_two_more():
    rounds = Rounds(AUTO)
    assert rounds.go((100, 51)).percents == []
    assert rounds.go((100, 51)).percents == [20]
    assert rounds.go((100, 99), (100, 99), (100, 99), (100, 99)).percents == [20, 30, 40]
    assert rounds.judge.percent == 40
    rounds.judge.stop()
    rounds.judge.stop()
    assert rounds.guest.percents == [20, 30, 40, 0]
    assert rounds.judge.percent == 0


def test_a_guest_that_writes_little_is_left_alone():
    rounds = Rounds(AUTO)
    assert rounds.go(*[(100, 50)] * 10).percents == []
    rounds.judge.stop()
    assert rounds.guest.percents == []


def test_the_threshold_and_the_steps_are_the_parameters():
    rounds = Rounds(AUTO, throttle_trigger_threshold=10, cpu_throttle_initial=5,
                    cpu_throttle_increment=40, max_cpu_throttle=95)  # fmt: skip
    assert rounds.go(*[(100, 11)] * 8).percents == [5, 45, 85, 95]


def test_short_rounds_are_judged_together():
    rounds = Rounds(AUTO)
    assert rounds.go(*[(10, 9)] * 5, seconds=0.11).percents == []
    assert rounds.go((10, 9), seconds=0.11).percents == [20]


def test_a_tail_that_is_slow():
    parameters = Parameters(cpu_throttle_tailslow=True)
    assert next_percent(parameters, 0, 0.5) == 20
    assert next_percent(parameters, 20, 0.95) == 24  # 80 % run; 76 would do
    assert next_percent(parameters, 20, 0.1) == 30  # at most a step
    assert next_percent(parameters, 95, 0.5) == 97


def test_a_limit_of_the_rate_in_place_of_it():
    rounds = Rounds(LIMIT, vcpu_dirty_limit=7, x_vcpu_dirty_limit_period=250)
    assert rounds.go((100, 99), (100, 99)).limits == [(7, 250)]
    rounds.judge.stop()
    assert rounds.guest.limits == [(7, 250), (0, 1000)]
    assert rounds.guest.percents == []


def test_neither_is_on():
    assert Rounds(None).go(*[(100, 1000)] * 10).percents == []


@pytest.mark.parametrize("capability", [AUTO, LIMIT])
def test_a_guest_whose_process_has_ended(capability):
    class Gone(Slowed):
        def throttle(self, percent):
            super().throttle(percent)
            if not percent:
                raise ChannelBroken("gone")

        def limit_dirty_rate(self, mebibytes, period_ms):
            self.throttle(mebibytes)

    rounds = Rounds(capability, Gone())
    rounds.go((100, 99), (100, 99))
    rounds.judge.stop()
    assert rounds.guest.percents[-1] == 0
