"""In place of what keeps CPUs awake: notes of what it was told."""


class CpusNoted:
    """A :class:`postcopy.kernel.cpu_latency.CpusAwake` that does nothing.

    :ivar calls: what it was told, in order; a test may add what happened between.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def a_while(self) -> None:
        self.calls.append("a while")

    def close(self) -> None:
        self.calls.append("close")
