"""Write ``docs/monitor.md`` from the monitors' tables; ``--check`` only says whether it is current."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterable

from postcopy import events
from postcopy.errors import Reason
from postcopy.monitor.command import Command
from postcopy.monitor.hmp import COMMANDS as HMP
from postcopy.monitor.qmp_session import COMMANDS as QMP
from postcopy.ownership import Owner
from postcopy.parameter_rules import Kind, Rule
from postcopy.parameters import MEANINGS, REASONS, SUPPORTED, Capability, Parameters, rules
from postcopy.statistics import Measured

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "monitor.md"
HEAD = """\
# The monitors

Made by `scripts/draw_monitor.py` from the tables of the code, such as
[`commands.py`](../src/postcopy/monitor/commands.py) and
[`parameters.py`](../src/postcopy/parameters.py); do not edit it here.

A machine has a human monitor (HMP: `--monitor`) and one for programs (QMP: `--qmp`). Commands,
arguments, events and error texts are QEMU 11.1's, so its documents hold for them. What starts with `x-` is
ours, but for the parameters `x-` that are listed as of no effect.
"""
OVERRIDES = """
Arguments in brackets may be left out. `x-capabilities` and `x-parameters` count for this order alone:
[orders.md](orders.md). HMP's `migrate_incoming` and `x_restore` stand for `exit-on-error: false`.
"""


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            HEAD,
            "## Commands\n",
            _table(("QMP", "arguments", "HMP", ""), (_command(each) for each in _commands())),
            OVERRIDES,
            "## Events\n",
            _table(("event", ""), ((f"`{n}`", text) for n, text in events.MEANINGS.items())),
            "\n## Members of our own\n",
            _table(("where", "member", ""), _members()),
            "\n## Parameters\n",
            "`migrate-set-parameters` sets them; they count from then on, for a migration under way too.\n",
            _table(("parameter", "value", "default", ""), map(_parameter, _with_effect())),
            f"\nKept for QEMU's clients, and of no effect here: {_listed(_without_effect())}."
            f" Of {_listed(_fixed())} only the default is accepted.",
            "\n## Capabilities\n",
            "`migrate-set-capabilities` switches them; all are off at first.\n",
            _table(
                ("capability", ""), ((f"`{c}`", MEANINGS[c]) for c in Capability if c in SUPPORTED)
            ),
            "\nThese have no meaning here, and are refused with the reason:\n",
            _table(("capability", ""), ((f"`{c}`", reason) for c, reason in REASONS.items())),
        ]
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in row)}|" for row in lines)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _commands() -> list[Command]:
    unnamed = {c.human_name: c for c in HMP.values() if not c.name}
    return [*QMP.values(), *(unnamed[name] for name in sorted(unnamed))]


def _command(command: Command) -> tuple[str, ...]:
    required, optional = command.arguments.required, command.arguments.optional
    if command.arguments.name != "object":
        arguments = [command.arguments.name]
    else:
        arguments = [f"`{name}: {check.name}`" for name, check in required.items()]
        arguments += [f"[`{name}: {check.name}`]" for name, check in optional.items()]
    more = "; may be executed out of band" if command.out_of_band else ""
    human = command.human
    forms = ""
    if human is not None:
        first, *aliases = command.human_name.split("|")
        forms = _listed([f"{first} {human.usage}".strip(), *aliases])
        more += "".join(f"; `-{flag.letter}`: {flag.help}" for flag in human.flags)
    name = f"`{command.name}`" if command.name else ""
    return name, ", ".join(arguments), forms, command.help + more


def _members() -> Iterable[tuple[str, str, str]]:
    where = "`x-postcopy` of `query-migrate`"
    for each in dataclasses.fields(Measured):
        unit = " (microseconds)" if each.name.endswith("_us") else ""
        yield where, f"`{each.name.replace('_', '-')}`", each.metadata["meaning"] + unit
    owners = _listed(owner.value for owner in Owner)
    yield (
        "`query-status`",
        "`x-owner`",
        f"whose the guest is: {owners}; see [ownership.md](ownership.md)",
    )
    yield "`query-status`", "`x-last-order`", "the last order: `name`, `direction`, `uri`"
    yield "an error", "`x-reason`", f"its kind, for a program: {_listed(Reason)}"


def _with_effect() -> list[str]:
    return [name for name, rule in rules().items() if rule.help]


def _without_effect() -> list[str]:
    return [name for name, rule in rules().items() if not rule.help]


def _fixed() -> list[str]:
    return [name for name, rule in rules().items() if rule.only is not None]


def _parameter(name: str) -> tuple[str, ...]:
    rule = rules()[name]
    return f"`{name}`", _values(rule), f"`{Parameters().to_qapi()[name]}`", rule.help


def _values(rule: Rule) -> str:
    if rule.kind is Kind.CHOICE:
        return _listed(rule.choices)
    if rule.kind is Kind.BOOLEAN:
        return "on or off"
    unit = "; MiB in HMP without a suffix" if rule.mebibytes else ""
    most = "" if rule.most == Rule(rule.kind).most else f" to {rule.most}"
    return f"{rule.least}{most or ' or more'}{unit}"


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit(f"{PAGE.name} is not what the tables say: run scripts/draw_monitor.py")
