"""Our small x86-64 machine: see :class:`~postcopy.machine.machine.Machine`."""
