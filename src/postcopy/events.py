"""What happened, told to the subscribers: monitors, logs, tests.

The names and members are QMP's, see :data:`MEANINGS`.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MEANINGS: Mapping[str, str] = {
    "MIGRATION": "the `status` has changed (with the capability `events`)",
    "MIGRATION_PASS": "round `pass` of precopy begins (with the capability `events`)",
    "STOP": "the vCPUs have stopped",
    "RESUME": "the vCPUs run",
    "SHUTDOWN": "the machine ends: by its `guest` or not, and the `reason`",
    "GUEST_PANICKED": "a vCPU cannot go on; `action` is `pause`",
}
"""The events that there are."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """One event with the wall clock time at which it was emitted."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    seconds: int = 0
    microseconds: int = 0

    @classmethod
    def now(cls, name: str, data: Mapping[str, Any] | None = None) -> "Event":
        """An event that carries the present time."""
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        return cls(name, dict(data or {}), seconds, nanoseconds // 1000)

    def to_qmp(self) -> dict[str, Any]:
        """The message that a QMP client gets; ``data`` is left out when there is none."""
        message: dict[str, Any] = {
            "timestamp": {"seconds": self.seconds, "microseconds": self.microseconds},
            "event": self.name,
        }
        if self.data:
            message["data"] = dict(self.data)
        return message


class EventBus:
    """Hands every event to every subscriber, in the order of the emits.

    Any thread may call any method.  Invariant, kept under one lock: all subscribers see the same
    events in the same order.  A callback runs in the emitter's thread and under that lock, so it
    must only put the event somewhere; it may emit, but not wait for another emitter.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._callbacks: list[Callable[[Event], None]] = []

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``callback`` with each event from now on.

        :return: call it to end the subscription; harmless when called again.
        """
        with self._lock:
            self._callbacks.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

        return unsubscribe

    def emit(self, name: str, data: Mapping[str, Any] | None = None) -> Event:
        """Tell all subscribers; one that fails is logged and does not keep it from the others."""
        with self._lock:
            event = Event.now(name, data)
            for callback in tuple(self._callbacks):
                try:
                    callback(event)
                except Exception:
                    _log.exception("a subscriber failed on event %s", name)
        return event
