"""What the guest's process and its engine must agree on."""

import base64
from collections.abc import Sequence
from typing import Any, Final

from postcopy.abi.userfaultfd import Feature, RegisterMode
from postcopy.guest import DeviceState

WRITE_FEATURES: Final = Feature.WP_ASYNC | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED
"""Of the userfaultfd by which the kernel tracks writes."""

MISSING_FEATURES: Final = (
    Feature.MISSING_SHMEM
    | Feature.MISSING_HUGETLBFS
    | Feature.MINOR_SHMEM
    | Feature.MINOR_HUGETLBFS
    | Feature.THREAD_ID
)
MISSING_MODE: Final = RegisterMode.MISSING | RegisterMode.MINOR
SNAPSHOT_FEATURES: Final = (
    Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED
)

BEAT_S: Final = 0.5
"""How often an engine says that it lives."""


def decode_states(encoded: Sequence[Sequence[Any]]) -> list[DeviceState]:
    """What :func:`encode_states` has encoded."""
    return [
        DeviceState(name, instance, version, base64.b64decode(payload))
        for name, instance, version, payload in encoded
    ]


def encode_states(states: Sequence[DeviceState]) -> list[list[Any]]:
    """Device states as JSON can carry them."""
    return [
        [state.name, state.instance, state.version, base64.b64encode(state.payload).decode()]
        for state in states
    ]
