"""The source of a postcopy is gone for good: what becomes of the pages that will never come."""

from collections.abc import Callable
from contextlib import suppress

from postcopy.errors import PostcopyError, WrongState
from postcopy.link.guest_service import GuestService, OwnedGuest
from postcopy.link.host import check_poison

_GONE = "the source is gone for good"


def poison(guest: OwnedGuest, service: GuestService, end_engine: Callable[[], None]) -> str:
    """The guest goes on without the pages that will never come, and never reads zeros instead.

    :param end_engine: called when that is possible: nobody comes back from here.
    :return: what to tell the user.
    :raises HostCannot: nothing has changed.
    """
    check_poison(guest)
    end_engine()
    lost = service.poison_missing()
    pages = ", ".join(f"{count} pages of block '{name}'" for name, count in lost.items())
    return f"{_GONE}: {pages} are lost; who touches one of them fails"


def abandon(guest: OwnedGuest, service: GuestService, end_engine: Callable[[], None]) -> str:
    """The guest cannot go on: let go of what its vCPUs wait for, as far as that is possible.

    :return: what to tell the user.
    """
    end_engine()
    with suppress(PostcopyError):  # a vCPU that waits for a page may be unstoppable
        check_poison(guest)
        service.poison_missing()
    return f"{_GONE}, and the guest cannot go on without its pages"


def refuse_to_hold() -> None:
    """Neither of them is wanted.

    :raises WrongState: always.
    """
    raise WrongState(
        "x-on-loss is 'hold': the guest waits for its source; set it to 'poison' or 'quit' first, if "
        "the source is gone for good"
    )
