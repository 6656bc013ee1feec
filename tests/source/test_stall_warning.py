"""What a user is told of pages that take seconds to come."""

from postcopy.source.switchover import stall_warning


def test_pages_of_1_gib_at_the_bandwidth_that_was_measured():
    assert stall_warning("ram", 1 << 30, 200 << 20) == (
        "RAM block 'ram' has pages of 1 GiB: at the 200 MiB/s that were sent until now, a vCPU that "
        "touches one that has not come stands still for 5.1 s"
    )


def test_nothing_before_anything_was_measured():
    assert stall_warning("ram", 1 << 30, 0) is None
