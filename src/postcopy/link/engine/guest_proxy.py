"""The guest as its engine sees it: :class:`postcopy.guest.Guest`, over the link."""

from collections.abc import Sequence

from postcopy.errors import PostcopyError
from postcopy.guest import DeviceState, Guest, Resuming, RunControl, VcpuThread
from postcopy.link.protocol import GUEST_COMMANDS
from postcopy.link.rpc import Answer, Link, senders


class Saving:
    """See :class:`postcopy.guest.Saving`."""

    def __init__(self, answer: Answer[Sequence[DeviceState]], began_ns: int) -> None:
        self._answer = answer
        self.began_ns = began_ns

    def states(self) -> Sequence[DeviceState]:
        """Wait for their states."""
        return self._answer.wait()

    def settle(self) -> None:
        """Wait until nothing of it is under way."""
        self._answer.settle()


class GuestProxy(Guest):
    """A guest in another process: what is not here is sent to it as it is declared."""

    def __init__(self, link: Link) -> None:
        self._link = link
        for interface in GUEST_COMMANDS:
            vars(self).update(senders(interface, link))
        self._described = self.describe()

    @property
    def machine_name(self) -> str:
        """What the configuration section says."""
        return self._described.machine_name

    @property
    def kvm(self) -> bool:
        """Whether KVM can keep a dirty log of it."""
        return self._described.kvm

    def vcpu_threads(self) -> Sequence[VcpuThread]:
        """The threads that run vCPUs."""
        return self._described.vcpu_threads

    def pause_to_save(self) -> Saving:
        """Stop every vCPU, and have the devices saved while the caller does something else."""
        parked = self._link.ask(RunControl.pause, to_move=True)
        saved = self._link.ask(RunControl.pause_and_save, to_move=True)
        try:
            began_ns = parked.wait()
        except PostcopyError:
            saved.settle()  # it may have stopped them after all, but does no more
            raise
        return Saving(saved, began_ns)

    def begin_to_resume(self) -> Resuming:
        """Let the vCPUs run, while the caller does something else."""
        return self._link.ask(RunControl.resume)


def guest_over(link: Link) -> Guest:
    """The guest at the other end; asked at once what does not change of it."""
    return GuestProxy(link)  # type: ignore[abstract]  # the methods are made when it is
