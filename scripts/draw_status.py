"""Write ``docs/status.md`` from the status table; ``--check`` only says whether it is current."""

import pathlib
import sys

from postcopy import status

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "status.md"
HEAD = """\
# Where a migration stands

Drawn by `scripts/draw_status.py` from the one table in [`status.py`](../src/postcopy/status.py);
do not edit it here. Source and destination walk the same table. The names are QEMU's
`MigrationStatus`.

In `postcopy-device` the source has given the guest up, and the destination loads its devices. Should
it refuse them, both sides fail and the guest runs on at the source; a source that hears nothing
pauses, for it cannot know.

From `postcopy-active` on each side holds pages that the other lacks. A broken channel then leads to
`postcopy-paused`, never to `failed`, and both sides wait for as long as it takes.

A source of QEMU 11.1 says `failing` before each `failed`, while it cleans up; one of 10.0 does not, nor
does ours: it says `failed` when the guest runs again.
"""


def page() -> str:
    """The whole page."""
    return f"{HEAD}\n{status.table()}\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit("docs/status.md is not current; run scripts/draw_status.py")
