"""Arguments from Python that JSON, or QMP, cannot carry: refused by name, and the connection lives on."""

import asyncio

import numpy as np
import pytest

from fakes.monitor_backend import make_backend
from postcopy import Machine, Refused
from postcopy.monitor.server import serve_qmp

CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)
ODD = [
    float("nan"),
    float("inf"),
    -float("inf"),
    "\udcff",
    {"\ud800": 1},
    b"bytes",
    {1, 2},
    object(),
    CIRCLE,
    10**5000,
    10**4000,
    np.int64(3),
    np.float32(1.5),
    "x" * (2 << 20),
    [1] * (1 << 20),
]


@pytest.fixture
def address(tmp_path):
    server = serve_qmp(f"unix:{tmp_path}/qmp", make_backend())
    yield server.address
    server.close()


@pytest.mark.parametrize("value", ODD, ids=lambda value: f"{type(value).__name__}")
def test_it_is_refused_and_the_connection_lives_on(address, value):
    async def order():
        async with Machine.connect(address) as machine:
            with pytest.raises(Refused) as caught:
                await machine.set_parameters({"max-bandwidth": value})
            return str(caught.value), await machine.run_state()

    said, state = asyncio.run(order())
    assert state == "running"
    assert "migrate-set-parameters" in said
    assert len(said) < 400


def test_numbers_that_fit_into_no_parameter_are_the_machines_to_refuse(address):
    async def order():
        async with Machine.connect(address) as machine:
            for value in (2**64, 1.5, 1e308, 10**250, None, True, "1", [], {}):
                with pytest.raises(Refused):
                    await machine.set_parameters({"max-bandwidth": value})
            return await machine.run_state()

    assert asyncio.run(order()) == "running"
