"""One object a kernel facility, and the only place that makes kernel calls.

All of them let go of the interpreter lock while they wait, and raise
:class:`~postcopy.errors.KernelError`; what a host lacks is :class:`~postcopy.errors.HostCannot`.
"""
