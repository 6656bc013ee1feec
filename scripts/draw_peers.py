"""Write ``docs/peers.md`` from the marks of the interop tests; ``--check`` says whether it is current."""

import contextlib
import io
import pathlib
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from fakes import peers  # noqa: E402


class Gatherer:
    """Takes the tests that pytest has found."""

    def __init__(self) -> None:
        self.proofs: set[peers.Proof] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Called by pytest; runs that find no test need not be told apart."""
        for item in session.items:
            self.proofs |= peers.proofs_of(item)


def gather() -> set[peers.Proof]:
    """What the tests prove; none of them is run."""
    gatherer = Gatherer()
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = pytest.main(
            ["--collect-only", "-q", "-p", "no:cacheprovider", str(TESTS / "interop")], [gatherer]
        )
    if code != pytest.ExitCode.OK:
        sys.exit(told.getvalue())
    return gatherer.proofs


if __name__ == "__main__":
    text = peers.page(peers.PAGE.read_text(), gather())
    if "--check" not in sys.argv:
        peers.PAGE.write_text(text)
    elif peers.PAGE.read_text() != text:
        sys.exit("docs/peers.md is not current; run scripts/draw_peers.py")
