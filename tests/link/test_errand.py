"""Orders that may take longer than the caller is to wait."""

import threading

import pytest

from fakes.waiting import wait_until
from postcopy.errors import Refused, WrongState
from postcopy.link.errand import Errands


def refuse():
    raise Refused("the address is taken")


def test_what_is_known_soon_is_said_at_once():
    errands, late, done = Errands(20), [], []
    errands.run(lambda: done.append(True), late.append)
    assert done == [True]
    with pytest.raises(Refused, match="the address is taken"):
        errands.run(refuse, late.append)
    assert late == []


def test_what_takes_long_goes_on_alone():
    errands, late, go = Errands(0.01), [], threading.Event()

    def refuse_later():
        go.wait(20)
        refuse()

    errands.run(refuse_later, late.append)
    with pytest.raises(WrongState, match="still being carried out"):
        errands.run(lambda: None, late.append)
    assert late == []
    go.set()
    wait_until(lambda: [str(error) for error in late] == ["the address is taken"], 20, "its error")
    Errands(20).run(lambda: None, late.append)
