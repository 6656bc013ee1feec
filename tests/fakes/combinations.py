"""Kinds of memory, back ends and journeys: what is tested together, and the table of docs/vhost_user.md.

``PYTHONPATH=tests python -m fakes.combinations`` writes the page.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

PAGE: Final = Path(__file__).resolve().parent.parent.parent / "docs" / "vhost_user.md"
_MARK: Final = "<!-- the table; written by tests/fakes/combinations.py -->\n"

MEMORY: Final = {
    "memfd": "memfd",
    "tmpfs": "a file in tmpfs",
    "hugetlb": "2 MiB hugetlb",
    "mixed": "a block of 2 MiB pages and one of 4 KiB",
}
BACK_ENDS: Final = {
    "none": "none",
    "ours": "`postcopy vhost-user-blk`",
    "qemu": "`qemu-storage-daemon`",
    "dpdk": "`dpdk-testpmd`",
}
JOURNEYS: Final = (
    "precopy",
    "postcopy",
    "preempt",
    "recovery",
    "snapshot",
    "lazy restore",
    "reset",
)
RESET_REFUSED: Final = "the guest has a drive or a network device, which a reset does not take back"

_WITHOUT: Final = "test_memory_kinds.py::"
_TESTS_WITHOUT: Final = {
    "precopy": "test_precopy",
    "postcopy": "test_postcopy",
    "preempt": "test_preempt",
    "recovery": "test_recovery",
    "snapshot": "test_background_snapshot",
    "lazy restore": "test_lazy_restore_with_its_working_set",
    "reset": "test_reset",
}
_TEST_WITH: Final = "test_combinations.py::test_all_journeys"


class Cell(NamedTuple):
    """What is done about a combination.

    :ivar test: in ``tests/journeys``; it makes the journey, or gives the order that is refused.
    :ivar refused: the error; None: it works.
    """

    test: str
    refused: str | None = None


def cell(back_end: str, journey: str) -> Cell:
    """For every kind of memory alike."""
    if back_end == "none":
        return Cell(_WITHOUT + _TESTS_WITHOUT[journey])
    return Cell(_TEST_WITH, RESET_REFUSED if journey == "reset" else None)


def cells() -> Iterator[Cell]:
    """Those of one kind of memory."""
    for back_end in BACK_ENDS:
        for journey in JOURNEYS:
            yield cell(back_end, journey)


def table() -> str:
    """The table of the manual, and its notes."""
    notes: list[str] = []
    lines = [
        f"| memory | back end | {' | '.join(JOURNEYS)} |",
        "| --- | --- |" + " --- |" * len(JOURNEYS),
    ]
    for memory, named in MEMORY.items():
        for back_end, name in BACK_ENDS.items():
            row = (_noted(cell(back_end, journey), memory, back_end, notes) for journey in JOURNEYS)
            lines.append(f"| {named} | {name} | {' | '.join(row)} |")
    return (
        "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])
        + "\n"
    )


def _noted(what: Cell, memory: str, back_end: str, notes: list[str]) -> str:
    parameters = "MEMORY" if back_end == "none" else "MEMORY-BACK_END"
    test = f"tested by `{what.test}[{parameters}]`"
    note = f'refused: "{what.refused}"; {test}' if what.refused else test
    if note not in notes:
        notes.append(note)
    number = notes.index(note) + 1
    return f"refused ({number})" if what.refused else f"yes ({number})"


def page(text: str) -> str:
    """The page with the table as it is now."""
    before, mark, rest = text.partition(_MARK)
    assert mark, "the page has lost the mark before its table"
    _, heading, after = rest.partition("\n<!-- the end of the table -->")
    return f"{before}{mark}{table()}{heading}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
