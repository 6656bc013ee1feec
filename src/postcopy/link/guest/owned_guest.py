"""The guest of this process, as the migration subsystem uses it; our machine implements it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from postcopy import ownership
from postcopy.announcement import AnnouncementTimes
from postcopy.guest import DeviceState, VcpuThread
from postcopy.link.guest.sharing import SharingGuest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Announces(Protocol):
    """Announcements; any thread may call."""

    def begin(self, times: AnnouncementTimes, name: str = "") -> None:
        """Announce now, and then again and again, in place of the series of the same name."""


class OwnedGuest(SharingGuest, Protocol):
    """A guest in this process, which knows whether it may run here; any thread may call any method."""

    @property
    def machine_name(self) -> str:
        """What the configuration section says, such as ``microvm``."""

    @property
    def accelerator_name(self) -> str:
        """``kvm`` if KVM can keep a dirty log of it."""

    @property
    def ownership(self) -> ownership.Ownership:
        """Whose it is: every decision about that is made there."""

    @property
    def owned(self) -> bool:
        """Whether it is ours."""

    @property
    def running(self) -> bool:
        """Whether the vCPUs run."""

    @property
    def has_drive(self) -> bool:
        """Whether it has a drive, whose bytes no reset takes back."""

    @property
    def announcer(self) -> Announces:
        """What tells its network where it is."""

    def vcpu_threads(self) -> Sequence[VcpuThread]:
        """The threads that run vCPUs, in order of the vCPUs' numbers."""

    def pause(self, *, to_move: bool = False) -> None:
        """See :meth:`postcopy.guest.RunControl.pause`."""

    def resume(self, arrival: int | None = None) -> None:
        """See :meth:`postcopy.guest.RunControl.resume`.

        :param arrival: which guest was awaited when this one was loaded.
        """

    def save_devices(self) -> Sequence[DeviceState]:
        """The state of all devices of a stopped guest, ``globalstate`` last."""

    def load_devices(self, states: Sequence[DeviceState]) -> None:
        """See :meth:`postcopy.guest.RunControl.load_devices`."""

    def throttle(self, percent: int) -> None:
        """See :meth:`postcopy.guest.RunControl.throttle`."""

    def limit_dirty_rate(self, mebibytes: int, period_ms: int) -> None:
        """See :meth:`postcopy.guest.RunControl.limit_dirty_rate`."""

    def way_back(self, states: Sequence[DeviceState]) -> Callable[[], None]:
        """What takes the stopped guest back to an earlier point of its life, whatever it did since.

        :raises GuestError: a device refuses its state.
        """

    def start_dirty_log(self) -> None:
        """Begin to note the writes of the vCPUs."""

    def stop_dirty_log(self) -> None:
        """Stop noting."""

    def fetch_dirty_log(self, block: str) -> "npt.NDArray[np.uint8]":
        """Fetch and clear the log of one RAM block: packed bits, one a 4 KiB page."""
