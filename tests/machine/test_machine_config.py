"""What cannot be is refused in one line, before anything is made."""

import pytest

from machine.machines import MIB
from postcopy.errors import Refused
from postcopy.machine.config import MachineConfig, read_image

CODE = b"\xeb\xfe"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"memory_bytes": 3 * MIB}, "not a multiple of 2 MiB"),
        ({"memory_bytes": 0}, "not a multiple of 2 MiB"),
        ({"memory_bytes": 65538 * MIB}, "65538 MiB is too much for a machine; 65536 MiB do"),
        ({"vcpus": 0}, "0 vCPUs cannot be; give 1 to 64"),
        ({"vcpus": 65}, "65 vCPUs cannot be"),
        ({"privilege": 1}, "privilege 1 cannot be"),
        ({"accel": "tcg"}, "no accelerator is called 'tcg'"),
        ({"machine_type": "pc"}, "no machine is called 'pc'; give microvm or none"),
        ({"image": b""}, "the image is empty"),
        ({"load_address": 0x6000}, "would lie on the page tables; load it at 0x7000"),
        (
            {"memory_bytes": 5120 * MIB, "image": bytes(MIB)},
            "would lie on the page tables; load it at 0x101000",
        ),
        ({"image": bytes(2 * MIB)}, "does not fit into 2 MiB of memory"),
        ({"entry": 0x20000}, "entry 0x20000 is outside the image"),
    ],
)
def test_refusals(settings, why):
    config = MachineConfig(**({"memory_bytes": 2 * MIB, "image": CODE} | settings))
    with pytest.raises(Refused, match=why) as refusal:
        config.check()
    assert "\n" not in str(refusal.value)
    assert ";" in str(refusal.value)


def test_what_is_allowed():
    MachineConfig(2 * MIB, vcpus=64, image=CODE).check()
    MachineConfig(4096 * MIB, image=bytes(2 * MIB)).check()
    MachineConfig(65536 * MIB).check()


def test_reading_an_image(tmp_path):
    path = tmp_path / "image"
    with pytest.raises(Refused, match="cannot be read: No such file"):
        read_image(path)
    path.write_bytes(CODE)
    assert read_image(path) == CODE
