"""The source of a postcopy is gone for good: what becomes of the pages that will never come."""

from collections.abc import Callable
from contextlib import suppress

from postcopy.errors import PostcopyError, WrongState
from postcopy.link.guest.guest_service import GuestService, OwnedGuest
from postcopy.link.guest.preflight import check_poison

_GONE = "the source is gone for good"


def apply_on_loss(
    how: str, guest: OwnedGuest, service: GuestService, end_engine: Callable[[], None]
) -> str:
    """Give the missing pages up.

    :param how: the parameter ``x-on-loss``.
    :param end_engine: called when that is possible: nobody comes back from here.
    :return: what to tell the user.
    :raises WrongState: ``hold``; nothing has changed, as with every error.
    :raises HostCannot: this host, or this guest's accelerator, cannot poison pages.
    """
    match how:
        case "poison":
            return _poison(guest, service, end_engine)
        case "quit":
            return _abandon(guest, service, end_engine)
    raise WrongState(
        "x-on-loss is 'hold': the guest waits for its source; set it to 'poison' or 'quit' first, if "
        "the source is gone for good"
    )


def _poison(guest: OwnedGuest, service: GuestService, end_engine: Callable[[], None]) -> str:
    """The guest goes on without the pages that will never come, and never reads zeros instead."""
    check_poison(guest)
    end_engine()
    lost = service.poison_missing()
    pages = ", ".join(f"{count} pages of block '{name}'" for name, count in lost.items())
    return f"{_GONE}: {pages} are lost; who touches one of them fails"


def _abandon(guest: OwnedGuest, service: GuestService, end_engine: Callable[[], None]) -> str:
    """The guest cannot go on: let go of what its vCPUs wait for, as far as that is possible."""
    end_engine()
    with suppress(PostcopyError):  # a vCPU that waits for a page may be unstoppable
        check_poison(guest)
        service.poison_missing()
    return f"{_GONE}, and the guest cannot go on without its pages"
