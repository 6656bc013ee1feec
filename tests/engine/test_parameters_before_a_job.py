"""What the user sets before the engine has come to have a job is not lost."""

import contextlib
import socket

import pytest

from postcopy.engine import incoming, outgoing, restoring
from postcopy.engine.engine import Engine
from postcopy.engine.incoming import Incoming
from postcopy.engine.outgoing import Outgoing
from postcopy.engine.restoring import Restoring
from postcopy.parameters import Parameters, Settings
from postcopy.restore_options import RestoreOptions
from postcopy.status import Status

OLD, NEW = Parameters(max_bandwidth=1000), Parameters(max_bandwidth=7)
IMAGE = RestoreOptions("/image", began_ns=0)
SETTINGS = {"settings": Settings(parameters=OLD)}


class Worker:
    """A job of any kind that does nothing; the user sets parameters while it is being made."""

    addresses = ()
    identity = ""
    error = None

    def __init__(self, *_, **__):
        self.told = OLD
        self.meanwhile()

    def meanwhile(self):
        """Nothing."""

    def set_parameters(self, parameters):
        self.told = parameters

    def nothing(self, *_):
        """Whatever else it is told to do."""

    run = adopt = recover = begin_recovery = set_capabilities = stop_waiting = leave = start = (
        nothing
    )
    described = share = nothing


class AnyGuest:
    machine_name = "any"


ORDERS = {
    "start_source": {"uri": "tcp:127.0.0.1:1", **SETTINGS},
    "adopt_source": SETTINGS,
    "listen": {"uri": "tcp:127.0.0.1:0", **SETTINGS},
    "adopt_destination": {"uri": "tcp:127.0.0.1:0", **SETTINGS},
    "start_restore": {"options": IMAGE, "parameters": OLD},
    "adopt_restore": {"status": Status.POSTCOPY_ACTIVE, "options": IMAGE, "parameters": OLD},
}


def give(engine, order):
    """Have the engine carry out an order."""
    kind = next(kind for kind in (Outgoing, Incoming, Restoring) if hasattr(kind, order))
    getattr(kind(engine), order)(**ORDERS[order])


@pytest.fixture
def engine(monkeypatch):
    for module, name in (
        (outgoing, "Source"),
        (incoming, "Destination"),
        (incoming, "Listener"),
        (incoming, "Populating"),
        (restoring, "Restore"),
    ):
        monkeypatch.setattr(module, name, type(name, (Worker,), {}))
    monkeypatch.setattr("postcopy.engine.engine.guest_over", lambda _link: AnyGuest())
    ours, theirs = socket.socketpair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        made = Engine(theirs)
        made.ram = object()
        yield made


@pytest.mark.parametrize("order", ORDERS)
def test_they_count_whatever_the_order_says(engine, order):
    engine.set_parameters(parameters=Parameters(max_bandwidth=8))
    engine.set_parameters(parameters=NEW)
    give(engine, order)
    assert engine.job.told.max_bandwidth == 7


@pytest.mark.parametrize("order", ORDERS)
def test_and_so_do_those_that_come_while_the_job_is_being_made(engine, order, monkeypatch):
    monkeypatch.setattr(Worker, "meanwhile", lambda _: engine.set_parameters(parameters=NEW))
    give(engine, order)
    assert engine.job.told.max_bandwidth == 7


@pytest.mark.parametrize("order", ORDERS)
def test_without_them_the_order_counts(engine, order):
    give(engine, order)
    assert engine.job.told.max_bandwidth == 1000
