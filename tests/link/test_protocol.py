"""What is declared of the link is what both ends have, and each value comes out as it went in."""

import contextlib
import json
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.engine.engine import COMMANDS, Engine
from postcopy.guest import AddressSpace, DeviceState, MappedRange, Region
from postcopy.link.protocol import (
    CODEC,
    EngineReports,
    JobCommands,
    WatchCommands,
    is_note,
    messages,
)
from postcopy.link.values import Fd
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.statistics import Measured, MigrationInfo, RamStatistics
from postcopy.status import Status

FULL = MigrationInfo(
    Status.COMPLETED,
    ram=RamStatistics(total=7, mbps=1.5),
    error_desc="why",
    postcopy_vcpu_blocktime_ms=(1, 2),
    socket_address=({"type": "unix", "path": "/x"},),
    measured=Measured(blocktime_us=(1, 2), fault_latency_p99_us=9),
)


def over(value):
    fds = []
    text = json.dumps(CODEC.encode(value, fds))
    return CODEC.decode(json.loads(text), fds)


@pytest.mark.parametrize(
    "value",
    [
        FULL,
        Capabilities(frozenset({Capability.POSTCOPY_RAM, Capability.EVENTS})),
        Parameters(max_bandwidth=7, x_on_loss="poison"),
        [DeviceState("cpu", 0, 12, bytes(range(256)))],
        AddressSpace(7, [MappedRange("ram", 4096, 8192, 1 << 46)], 9),
        *Status,
    ],
)
def test_what_is_declared_comes_out_as_it_went_in(value):
    assert over(value) == value


# Names of blocks are a peer's: any text, that of the member that names a type among it.
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.binary(max_size=9)),
    lambda each: st.one_of(
        st.lists(each, max_size=3),
        st.lists(each, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["", "items", "at", "ram"]), each, max_size=3),
    ),
    max_leaves=10,
)


@given(values)
def test_and_so_does_any_other_value(value):
    assert over(value) == value


def test_descriptors_are_numbered_in_the_order_in_which_they_go():
    region = Region("ram", 4096, 4096, 0, 0, Fd(31))
    fds = []
    encoded = CODEC.encode({"fds": [Fd(11), Fd(12)], "region": region}, fds)
    assert fds == [11, 12, 31]
    decoded = CODEC.decode(encoded, [1, 2, 3])  # what the other process got for them
    assert decoded["fds"] == [1, 2]
    assert decoded["region"].fd == 3


def test_what_is_not_declared_is_not_sent():
    with pytest.raises(TypeError, match="PosixPath is not declared as a type of the link"):
        CODEC.encode(Path("x"), [])


@pytest.mark.parametrize("interface", [*COMMANDS, JobCommands, WatchCommands])
def test_an_engine_has_an_order_for_each_that_is_declared(interface):
    ours, theirs = socket.socketpair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        engine = Engine(theirs)
        assert messages(interface).keys() <= engine.link._handlers.keys()
        if interface in COMMANDS:
            implementation = COMMANDS[interface](engine)
            for name, declared in messages(interface).items():
                assert getattr(type(implementation), name) is not declared


def test_what_an_engine_reports_has_no_answer():
    assert all(map(is_note, messages(EngineReports).values()))
