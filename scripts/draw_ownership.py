"""Write ``docs/ownership.md`` from the table of ownership; ``--check`` only says whether it is current."""

import pathlib
import sys

from postcopy import ownership
from postcopy.ownership import MEANINGS, MOVES, RUNS, Move, Owner

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "ownership.md"
HEAD = """\
# Which side may run the guest

Drawn by `scripts/draw_ownership.py` from the one table in
[`ownership.py`](../src/postcopy/ownership.py); do not edit it here.

Each guest's process keeps one owner. An engine and a user ask for a move, and the table decides under
one lock. A move that is not in the table is refused, and nothing changes. A migration has two such
tables, one on each side; `tests/model/handover.py` explores both together, with every order of a user,
every broken link and every engine that dies, and finds no state in which both sides run the guest.

`query-status` of a postcopy machine names the owner (`x-owner`) and the last order (`x-last-order`).
"""
USERS = {
    Move.ORDER: "`migrate`",
    Move.CANCEL: "`migrate_cancel`",
    Move.CONT: "`cont`",
    Move.RESUME: "`migrate -r`",
    Move.AWAIT: "`migrate-incoming`, `restore`",
}


def page() -> str:
    """The whole page."""
    return f"{HEAD}\n{ownership.table()}\n\n{_owners()}\n{_orders()}"


def _owners() -> str:
    rows = [
        "## The owners",
        "",
        "| owner | vCPUs may run | meaning | what to do |",
        "| --- | --- | --- | --- |",
    ]
    for owner in Owner:
        meaning, runs = MEANINGS[owner], "yes" if owner in RUNS else "no"
        rows.append(f"| `{owner.value}` | {runs} | {meaning.text} | {meaning.advice} |")
    return "\n".join(rows) + "\n"


def _orders() -> str:
    rows = ["## What a user may order", "", "| owner | " + " | ".join(USERS.values()) + " |"]
    rows.append("| --- |" + " --- |" * len(USERS))
    for owner in Owner:
        cells = [_cell(move, owner) for move in USERS]
        rows.append(f"| `{owner.value}` | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _cell(move: Move, owner: Owner) -> str:
    to = MOVES[move].get(owner)
    if to is None:
        return "refused"
    return "no change" if to is owner else f"`{to.value}`"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit("docs/ownership.md is not current; run scripts/draw_ownership.py")
