"""What a machine is doing: QEMU's ``RunState`` (``qapi/run-state.json``), as far as we have it."""

import enum


class RunState(enum.StrEnum):
    """The values are what QMP, HMP and the stream's ``globalstate`` section say."""

    PRELAUNCH = "prelaunch"  # made, never started
    RUNNING = "running"
    PAUSED = "paused"  # by the user
    INMIGRATE = "inmigrate"  # waits for a guest to come
    FINISH_MIGRATE = "finish-migrate"  # stopped by a migration that is about to end
    POSTMIGRATE = "postmigrate"  # its guest has gone elsewhere
    INTERNAL_ERROR = "internal-error"  # a vCPU cannot go on
    SHUTDOWN = "shutdown"  # the guest has switched itself off

    @property
    def needs_reset(self) -> bool:
        """Whether the guest has ended: nothing to let run."""
        return self in {RunState.INTERNAL_ERROR, RunState.SHUTDOWN}
