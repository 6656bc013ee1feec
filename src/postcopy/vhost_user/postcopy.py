"""A back end's part in postcopy: a userfaultfd for the front end, and memory that is watched by it.

The order is ADVISE (we hand a userfaultfd over), LISTEN, the memory table (we answer with our own
addresses, so that the front end knows the faults that it will read), its acknowledgement (from then on a
missing page is waited for), END.

Our own duplicate of the userfaultfd stays open until END: if the front end died and its were the last, a
missing page would become zeros.
"""

from collections.abc import Iterable
from enum import IntEnum

from postcopy.abi.userfaultfd import Feature, RegisterMode
from postcopy.errors import HostCannot, VhostUserError
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.vhost_user.memory import MappedRegion

_FEATURES = Feature.MISSING_SHMEM | Feature.MISSING_HUGETLBFS


class Stage(IntEnum):
    """How far it has come."""

    NONE = 0
    ADVISED = 1
    LISTENING = 2
    TABLE_SENT = 3
    """Our addresses have been sent; the next message is more of the table, or the acknowledgement."""


class Postcopy:
    """The postcopy of one front end."""

    def __init__(self) -> None:
        self.stage = Stage.NONE
        self._userfaultfd: Userfaultfd | None = None

    @property
    def is_listening(self) -> bool:
        """Whether memory that comes now is watched."""
        return self.stage >= Stage.LISTENING

    def advise(self) -> int:
        """Begin; return the userfaultfd, which stays ours.

        :raises HostCannot: there is none for this user.
        """
        self.end()
        self._userfaultfd = Userfaultfd.open(_FEATURES)
        self.stage = Stage.ADVISED
        return self._userfaultfd.fd

    def listen(self) -> None:
        """Have all memory that comes from now on watched.

        :raises VhostUserError: it was not advised, or listens already.
        """
        if self.stage is not Stage.ADVISED:
            raise VhostUserError(f"after POSTCOPY_ADVISE only, and the stage is {self.stage.name}")
        self.stage = Stage.LISTENING

    def arm(self, regions: Iterable[MappedRegion]) -> None:
        """Watch the regions; from now on a page that is missing is waited for.

        :raises KernelError: one cannot be watched.
        """
        assert self._userfaultfd is not None
        for region in regions:
            if not region.is_watched:
                mapping = region.mapping
                self._userfaultfd.register(mapping.address, mapping.length, RegisterMode.MISSING)
                region.is_watched = True
        self.stage = Stage.LISTENING

    def end(self) -> None:
        """All pages have come; or there is no postcopy."""
        if self._userfaultfd is not None:
            self._userfaultfd.close()
            self._userfaultfd = None
        self.stage = Stage.NONE


def is_possible() -> bool:
    """Whether this user can have a userfaultfd that sees the faults of system calls, too."""
    try:
        Userfaultfd.open(_FEATURES).close()
    except HostCannot:
        return False
    return True
