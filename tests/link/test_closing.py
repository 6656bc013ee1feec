"""A migration subsystem is closed in time, whatever it waits for."""

import os
import signal
import threading

import pytest

from fakes.awakening import half_awake
from fakes.pair import hammer
from fakes.stacks import stacks
from fakes.waiting import wait_until
from journeys.conftest import journey, nothing_left_behind
from postcopy.errors import PostcopyError

__all__ = ["journey", "nothing_left_behind"]

pytestmark = pytest.mark.kvm


def test_while_a_reset_point_waits_for_a_restore(journey, tmp_path):
    trip = journey(hammer())
    side = half_awake(trip, tmp_path / "image")
    engine = side.stop_engine()
    refused = []

    def set_point():
        with pytest.raises(PostcopyError) as caught:
            side.control.resetting.set_point()
        refused.append(str(caught.value))

    setting = threading.Thread(target=set_point, daemon=True)
    setting.start()
    wait_until(lambda: "complete_first" in stacks(), 10, "it waits")
    try:
        closing = threading.Thread(target=side.control.close, daemon=True)
        closing.start()
        closing.join(15)
        assert not closing.is_alive(), stacks()
        setting.join(15)
        assert refused == ["this process is leaving"]
    finally:
        os.kill(engine, signal.SIGKILL)
