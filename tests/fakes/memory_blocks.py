"""Machines of several RAM blocks, as a user starts them."""

from collections.abc import Sequence
from pathlib import Path

from fakes.commands import Running


class RunningBlocks(Running):
    """A ``postcopy run`` with these ``--memory-block``; with ``image``, a ``postcopy restore`` of it."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *options: str,
        blocks: Sequence[str],
        image: Path | None = None,
    ) -> None:
        super().__init__(folder, name, *options)
        self._blocks = [part for block in blocks for part in ("--memory-block", block)]
        self._image = image

    def _run_line(self) -> Sequence[str]:
        command = ["run"] if self._image is None else ["restore", str(self._image)]
        return [*self.command, *command, "--qmp", self.qmp, *self._blocks, *self._options]
