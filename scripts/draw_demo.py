"""Run ``postcopy demo`` and draw what it printed: ``docs/demo.svg``, the picture in the README."""

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console

PICTURE = Path(__file__).parent.parent / "docs" / "demo.svg"


def main() -> int:
    """Run the demo; leave the picture as it was unless the demo succeeded."""
    done = subprocess.run(
        [sys.executable, "-m", "postcopy", "demo"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        return done.returncode
    console = Console(record=True, width=104, file=io.StringIO())
    console.print("$ make demo", style="bold")
    console.print(done.stdout.rstrip(), highlight=False, markup=False)
    console.save_svg(str(PICTURE), title="postcopy demo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
