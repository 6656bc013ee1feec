"""What a machine tells, in words that may be newer than this client."""

from collections.abc import Mapping
from typing import Any

from postcopy.status import Status


def status_of(answer: Mapping[str, Any]) -> Status | str:
    """The status in an answer to ``query-migrate``; its name alone if this client does not know it."""
    told = answer.get("status", Status.NONE.value)
    try:
        return Status(told)
    except ValueError:
        return str(told)


def name_of(status: Status | str) -> str:
    """As the machine calls it."""
    return status.value if isinstance(status, Status) else status
