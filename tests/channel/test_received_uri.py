"""Where an order sends an engine."""

import pytest

from postcopy.channel.descriptor_check import received_uri
from postcopy.errors import WrongState


def test_a_descriptor_is_the_one_that_came_along():
    assert received_uri("fd:7", [12]) == "fd:12"
    assert received_uri("tcp:localhost:1", []) == "tcp:localhost:1"


def test_a_descriptor_that_did_not_come_along_is_not_taken_for_another_of_the_same_number():
    with pytest.raises(WrongState, match="what 'fd:7' was has gone with the engine process"):
        received_uri("fd:7", [])
