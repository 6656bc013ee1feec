"""The figures of query-migrate: which are told when, and the way over the link and back."""

import pytest

from postcopy.statistics import Measured, MigrationInfo, RamStatistics
from postcopy.status import Status

FULL = {
    "ram": RamStatistics(transferred=5, mbps=1.5),
    "total_time_ms": 10,
    "downtime_ms": 2,
    "expected_downtime_ms": 300,
    "setup_time_ms": 1,
    "error_desc": "why",
    "postcopy_blocktime_ms": 3,
    "postcopy_vcpu_blocktime_ms": (1, 2),
    "postcopy_latency_ns": 7,
    "postcopy_non_vcpu_latency_ns": 8,
    "postcopy_vcpu_latency_ns": (4, 0),
    "postcopy_latency_dist": tuple(range(24)),
    "socket_address": ({"type": "unix", "path": "/x"},),
    "measured": Measured(blocktime_us=(1, 2), fault_latency_p99_us=9),
}


def test_nothing_before_any_migration():
    assert MigrationInfo().to_qapi() == {}


BARE = {"status", "error-desc", "x-postcopy"}
FIGURES = BARE | {"ram", "total-time", "setup-time", "downtime"}


@pytest.mark.parametrize(
    ("status", "keys"),
    [
        (Status.SETUP, BARE),
        (Status.FAILED, BARE),
        (Status.CANCELLED, BARE),
        (Status.CANCELLING, FIGURES | {"remaining"}),
        (Status.POSTCOPY_PAUSED, FIGURES | {"remaining"}),
        (Status.COMPLETED, FIGURES),
    ],
)
def test_members_on_the_source(status, keys):
    assert set(MigrationInfo(status, **FULL).to_qapi()) == keys


def test_expected_downtime_until_it_is_known():
    info = MigrationInfo(Status.ACTIVE, expected_downtime_ms=300).to_qapi()
    assert info == {"status": "active", "expected-downtime": 300}


def test_members_on_the_destination():
    active = MigrationInfo(Status.POSTCOPY_ACTIVE, incoming=True, **FULL).to_qapi()
    assert set(active) == BARE | {"socket-address"}
    completed = MigrationInfo(Status.COMPLETED, incoming=True, **FULL).to_qapi()
    assert set(completed) - set(active) == {
        "postcopy-blocktime",
        "postcopy-vcpu-blocktime",
        "postcopy-latency",
        "postcopy-non-vcpu-latency",
        "postcopy-vcpu-latency",
        "postcopy-latency-dist",
    }
    assert completed["x-postcopy"] == {"blocktime-us": [1, 2], "fault-latency-p99-us": 9}
