"""What the house tests look at: the files of this checkout that are, or could be, committed."""

import functools
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@functools.cache
def files():
    """Paths relative to the root; from git, or from the disk where there is no repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        names = {pathlib.Path(name) for name in listed.stdout.split("\0") if name}
    else:
        kept = ("src", "tests", "docs", "scripts", "benchmarks")
        names = {path.relative_to(ROOT) for top in kept for path in (ROOT / top).rglob("*")}
    return sorted(name for name in names if (ROOT / name).is_file())


def modules(*tops):
    """The Python files under these folders."""
    return [path for path in files() if path.suffix == ".py" and path.parts[0] in tops]


def text(path):
    """A text file's contents, or None for a binary one."""
    data = (ROOT / path).read_bytes()
    return None if b"\0" in data else data.decode()
