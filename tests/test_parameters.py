"""Capabilities and parameters: what QEMU refuses is refused, in QEMU's words."""

import json

import pytest

from postcopy.errors import Refused
from postcopy.parameters import SUPPORTED, Capabilities, Capability, Parameters

C = Capability


def test_capabilities_change_together_or_not_at_all():
    before = Capabilities().with_changes({C.EVENTS: True})
    with pytest.raises(Refused, match="Mapped-ram migration is incompatible with postcopy"):
        before.with_changes({C.POSTCOPY_RAM: True, C.MAPPED_RAM: True})
    after = before.with_changes({C.POSTCOPY_RAM: True, C.EVENTS: False})
    assert list(after) == [C.POSTCOPY_RAM]
    assert list(before) == [C.EVENTS]


@pytest.mark.parametrize("capability", sorted(set(C) - SUPPORTED))
def test_what_is_not_implemented_is_refused_by_name_and_may_be_off(capability):
    with pytest.raises(Refused):
        Capabilities().with_changes({capability: True})
    assert list(Capabilities().with_changes({capability: False})) == []


def test_multifd_goes_with_postcopy_as_in_qemu_11_1():
    wanted = dict.fromkeys((C.POSTCOPY_RAM, C.POSTCOPY_PREEMPT, C.MULTIFD), True)
    assert set(Capabilities().with_changes(wanted)) == set(wanted)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (C.XBZRLE, "Multifd is not compatible with xbzrle"),
        (C.BACKGROUND_SNAPSHOT, "Background-snapshot is not compatible with multifd"),
    ],
)
def test_multifd_does_not_go_with(other, complaint):
    with pytest.raises(Refused, match=f"^{complaint}$"):
        Capabilities().with_changes({C.MULTIFD: True, other: True})


def test_multifd_must_be_set_before():
    with pytest.raises(Refused, match=r"^Multifd must be set before incoming starts$"):
        Capabilities().with_changes({C.MULTIFD: True}, incoming_started=True)


def test_what_the_listener_must_know_before():
    changes = {C.POSTCOPY_RAM: True, C.POSTCOPY_PREEMPT: True}
    with pytest.raises(Refused, match="Postcopy preempt must be set before incoming starts"):
        Capabilities().with_changes(changes, incoming_started=True)


def test_parameters_are_ours_and_qemus_in_one_table():
    parameters = Parameters().with_changes({"x-dirty-tracking": "kvm", "max-bandwidth": -1})
    assert parameters.x_dirty_tracking == "kvm"
    assert parameters.max_bandwidth == 2**64 - 1
    assert json.loads(json.dumps(parameters.to_qapi())) == parameters.to_qapi()
    assert Parameters().with_changes(parameters.to_qapi()) == parameters


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"multifd-channels": 0}, "Option multifd-channels expects a value between 1 and 255"),
        ({"x-dirty-tracking": "magic"}, "Parameter 'x-dirty-tracking' does not accept value"),
        ({"mode": "cpr-reboot"}, "'cpr-reboot' of parameter 'mode' is not implemented"),
        ({"max-bandwidth": 1, "no-such": 1}, "Parameter 'no-such' is unexpected"),
    ],
)
def test_parameters_refused(changes, complaint):
    with pytest.raises(Refused, match=complaint):
        Parameters().with_changes(changes)
