"""Which lacks keep a guest from moving."""

import pytest

from postcopy.cli.doctor import lacking
from postcopy.kernel.probe import Finding

ALL = (
    "userfaultfd: by device",
    "userfaultfd: by system call",
    "userfaultfd: MISSING_SHMEM",
    "userfaultfd: WP_HUGETLBFS_SHMEM",
    "PAGEMAP_SCAN",
    "KVM",
    "huge pages of 2 MiB",
)
TRACKING = "dirty tracking (PAGEMAP_SCAN or KVM)"


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        ((), []),
        (ALL[:1], []),
        (ALL[1:2], []),
        (ALL[:2], ["userfaultfd"]),
        (ALL[2:3], ["userfaultfd: MISSING_SHMEM"]),
        (("KVM",), []),
        (("PAGEMAP_SCAN",), []),
        (("PAGEMAP_SCAN", "KVM"), [TRACKING]),
        (ALL[-1:], []),
    ],
)
def test_only_what_nothing_replaces_is_missed(without, missing):
    findings = [Finding(name, name not in without, "as found") for name in ALL]
    assert lacking(findings) == missing
