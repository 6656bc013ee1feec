"""What has been ordered of one guest."""

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from postcopy.link.guest.job import Job


@dataclass(slots=True, eq=False)
class Current:
    """What the user has ordered last, and what that has come to; changed under :attr:`lock`.

    :ivar shown: the job that was ordered last.
    :ivar awaits: this process waits for a guest to come.
    :ivar expecting: an engine is being told where, or from which image.
    :ivar listening: and has been told.
    :ivar exit_on_error: the process ends when no guest comes.
    :ivar uri: where an outgoing guest was sent last.
    :ivar lock: may be taken more than once by one thread.
    """

    shown: Job
    awaits: bool
    expecting: bool = False
    listening: bool = False
    exit_on_error: bool = False
    uri: str = ""
    lock: AbstractContextManager[object] = field(default_factory=threading.RLock)
