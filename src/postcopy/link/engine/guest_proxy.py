"""The guest as its engine sees it: the methods of :class:`postcopy.guest.Guest`, over the link."""

import base64
from collections.abc import Mapping, Sequence

from postcopy.errors import PostcopyError
from postcopy.guest import DeviceState, Region, VcpuThread
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.link.protocol import decode_states, encode_states
from postcopy.link.rpc import Answer, Link


class Saving:
    """The devices of a stopped guest are being saved."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def states(self) -> Sequence[DeviceState]:
        """Wait for their states."""
        return decode_states(self._answer.wait())

    def settle(self) -> None:
        """Wait until nothing of it is under way: a guest that is let run then is not stopped again."""
        self._answer.settle()


class GuestProxy:
    """A guest in another process.

    Besides what every guest can do, this has what only the owner of an address space can: arming
    its userfaultfds, and noting that the guest has changed hands.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        description = link.call("describe")
        self._machine_name: str = description["machine"]
        self.process_id: int = description["pid"]
        self._threads = tuple(VcpuThread(*thread) for thread in description["vcpu_threads"])
        self.kvm: bool = description["kvm"]

    @property
    def machine_name(self) -> str:
        """What the configuration section says."""
        return self._machine_name

    def regions(self) -> Sequence[Region]:
        """The RAM blocks; each call opens new descriptors, which the caller closes."""
        described, fds = self._link.call("regions")
        return [Region(**{**region, "fd": fd}) for region, fd in zip(described, fds, strict=True)]

    def vcpu_threads(self) -> Sequence[VcpuThread]:
        """The threads that run vCPUs."""
        return self._threads

    def page_maps(self) -> Sequence[int]:
        """Descriptors of the page maps that the guest's process keeps, one a region."""
        fds: Sequence[int] = self._link.call("page_maps")[1]
        return fds

    def keep_stream(self, section: int, sizes_bytes: Mapping[str, int]) -> None:
        """Keep what another engine cannot know: RAM's section, and blocks that are none of ours."""
        self._link.call("keep_stream", section=section, sizes_bytes=dict(sizes_bytes))

    def kept_stream(self) -> tuple[int, Mapping[str, int]]:
        """What was kept so; section 0 when nothing was."""
        section, sizes_bytes = self._link.call("kept_stream")
        return section, sizes_bytes

    def pause(self) -> None:
        """Stop every vCPU."""
        self._link.call("pause")

    def resume(self) -> None:
        """Let the vCPUs run, unless the guest or its user wants it stopped."""
        self._link.call("resume")

    def save_devices(self) -> Sequence[DeviceState]:
        """The state of all devices of the stopped guest."""
        return decode_states(self._link.call("save_devices"))

    def pause_and_save(self) -> Sequence[DeviceState]:
        """Stop every vCPU and return the state of all devices: one call, since the guest waits for it."""
        return decode_states(self._link.call("pause_and_save"))

    def pause_to_save(self) -> Saving:
        """Stop every vCPU, and have the devices saved while the caller does something else."""
        parked = self._link.ask("pause", to_move=True)
        saved = self._link.ask("pause_and_save", to_move=True)
        try:
            parked.wait()
        except PostcopyError:
            saved.settle()  # it may have stopped them after all, but does no more
            raise
        return Saving(saved)

    def load_devices(self, states: Sequence[DeviceState]) -> None:
        """Give the devices their state."""
        self._link.call("load_devices", states=encode_states(states))

    def wake(self, states: Sequence[DeviceState]) -> None:
        """Give the devices their state and let the guest run, unless an engine before us has done it."""
        self._link.call("wake", states=encode_states(states))

    def abandon(self) -> bool:
        """Give the arriving guest up, and let go of what waits for its pages.

        :return: whether it never runs here from now on; False: it runs already.
        """
        abandoned: bool = self._link.call("abandon")
        return abandoned

    def lost_pages(self, block: str, pages: int) -> None:
        """So many pages of a block are lost by now; does not wait."""
        self._link.note("lost_pages", block=block, pages=pages)

    def give_up(self) -> None:
        """The other side may run the guest from now on; this one never does by itself again.

        :raises WrongState: the migration has been cancelled; the guest stays ours.
        """
        self._link.call("give_up")

    def save(self) -> None:
        """All of the guest is where nothing answers; it runs here only if a user says so."""
        self._link.call("save")

    def runs_there(self) -> None:
        """The destination is known to have taken it: nothing gives it back any more."""
        self._link.call("runs_there")

    def arrived_there(self) -> None:
        """The destination has every page: nothing of the guest is needed here any more."""
        self._link.call("arrived_there")

    def take_back(self) -> None:
        """The other side has said that it does not run the guest: it is ours again."""
        self._link.call("take_back")

    def watch_writes(self) -> None:
        """Arm asynchronous write-protection over all RAM."""
        self._link.call("watch_writes")

    def unwatch_writes(self) -> None:
        """Take it off again."""
        self._link.call("unwatch_writes")

    def watch_snapshot(self) -> Userfaultfd:
        """Register all RAM for a snapshot and hand over the userfaultfd; the guest keeps one too.

        Nothing is protected by that alone.
        """
        return Userfaultfd.from_fd(self._link.call("watch_snapshot")[1][0])

    def unwatch_snapshot(self) -> None:
        """Take the registration off, and with it every protection and every waiting write."""
        self._link.call("unwatch_snapshot")

    def populate(self, block: str, offset: int, length_bytes: int) -> None:
        """Map memory into the guest's process too, so that a first touch there costs nothing."""
        self._link.call("populate", block=block, offset=offset, length_bytes=length_bytes)

    def unmap_missing(self) -> None:
        """Take the pages that have not been received out of the guest's sight: a touch is a fault."""
        self._link.call("unmap_missing")

    def watch_missing(self, *, only_still: bool = False) -> Userfaultfd:
        """Register all RAM for faults and hand over the userfaultfd; the guest keeps one too.

        :param only_still: for an engine that takes over from another.
        :raises WrongState: ``only_still``, and nothing is missing any more.
        """
        answer = self._link.call("watch_missing", only_still=only_still)
        return Userfaultfd.from_fd(answer[1][0])

    def unwatch_missing(self) -> None:
        """All pages are in place: take the registration off, and with it every waiting fault."""
        self._link.call("unwatch_missing")

    def kvm_dirty_log(self, action: str, block: str = "") -> bytes:
        """Start or stop KVM's dirty log, or fetch (and clear) that of one block.

        :return: packed bits, one a 4 KiB page of the block.
        """
        return base64.b64decode(self._link.call("kvm_dirty_log", action=action, block=block))
