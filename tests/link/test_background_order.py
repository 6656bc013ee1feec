"""Orders that may take longer than the caller is to wait."""

import threading

import pytest

from fakes.waiting import wait_until
from postcopy.errors import HostCannot, Refused, WrongState
from postcopy.link.guest.background_order import BackgroundOrder


def refuse():
    raise Refused("the address is taken")


def test_what_is_known_soon_is_said_at_once():
    order, late, done = BackgroundOrder(20), [], []
    order.run(lambda: done.append(True), late.append)
    assert done == [True]
    with pytest.raises(Refused, match="the address is taken"):
        order.run(refuse, late.append)
    assert late == []


def test_what_takes_long_goes_on_alone():
    order, late, go = BackgroundOrder(0.01), [], threading.Event()

    def refuse_later():
        go.wait(20)
        refuse()

    order.run(refuse_later, late.append)
    with pytest.raises(WrongState, match="still being carried out"):
        order.run(lambda: None, late.append)
    assert late == []
    go.set()
    wait_until(lambda: [str(error) for error in late] == ["the address is taken"], 20, "its error")
    BackgroundOrder(20).run(lambda: None, late.append)


def test_one_for_which_there_is_no_thread_is_refused_and_the_next_is_carried_out(no_threads):
    order, late, done = BackgroundOrder(20), [], []
    no_threads.refuse("errand")
    with pytest.raises(HostCannot, match="raise the limit of threads"):
        order.run(lambda: done.append("first"), late.append)
    no_threads.allow()
    order.run(lambda: done.append("second"), late.append)
    assert (done, late) == (["second"], [])
