"""Tells the network where the guest is: until then switches send its frames to where it was before.

What is sent, and where, is the network back end's to know: see :meth:`Announcer.begin`.
"""

import threading
from collections.abc import Callable
from typing import Final, Protocol

from postcopy.announcement import AnnouncementTimes
from postcopy.errors import HostCannot
from postcopy.kernel import threads

_ARRIVAL: Final = ""
"""The series of a guest that has arrived; it has no name, and so has one that is ordered without a name."""


class NetworkDevice(Protocol):
    """The device that the network knows."""

    def announce(self) -> None:
        """Tell the device's network, if it is on one, where the guest is; never fails."""


class Announcer:
    """Series of announcements, each with a name; any thread may call any method.

    :param pause: waits for so many seconds, and returns whether the series is over; for tests.
    :ivar device: what announces once; None: the machine is on no network.
    """

    def __init__(
        self, pause: Callable[[threading.Event, float], bool] = threading.Event.wait
    ) -> None:
        self.device: NetworkDevice | None = None
        self._pause = pause
        self._lock = threading.Lock()
        self._over: dict[str, threading.Event] = {}  # what ends each series

    def begin(self, times: AnnouncementTimes, name: str = _ARRIVAL) -> None:
        """Announce now, and then again and again, in place of the series of the same name."""
        over = threading.Event()
        with self._lock:
            before, self._over[name] = self._over.get(name), over
        if before is not None:
            before.set()
        if not times.rounds or self.device is None:
            return
        thread = threading.Thread(
            target=self._run, args=(self.device, times, over), name="announce", daemon=True
        )
        try:
            threads.start(thread)
        except HostCannot:
            self.device.announce()  # once is better than never

    def close(self) -> None:
        """End all series."""
        with self._lock:
            series, self._over = list(self._over.values()), {}
        for over in series:
            over.set()

    def _run(self, device: NetworkDevice, times: AnnouncementTimes, over: threading.Event) -> None:
        device.announce()
        for pause_s in times.pauses_s():
            if self._pause(over, pause_s):
                return
            device.announce()
