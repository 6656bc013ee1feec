"""``postcopy doctor``: the features of this host, and cures for missing ones."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from postcopy.cli.failures import REFUSED

if TYPE_CHECKING:
    from postcopy.kernel.probe import Finding

_WAYS_TO_OPEN = ("userfaultfd: by device", "userfaultfd: by system call")
_PLACING = "userfaultfd: MISSING_SHMEM"
_TRACKING = (("PAGEMAP_SCAN", "userfaultfd: WP_HUGETLBFS_SHMEM"), ("KVM",))


@click.command(short_help="Check the features of this host, with cures for missing ones.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def doctor(context: click.Context, /, as_json: bool) -> None:
    """Check every feature of this host that migration needs.

    Exits with 0 when migration with postcopy can work here, else with 3.
    """
    from postcopy.kernel.probe import probe_host

    findings = probe_host()
    missing = lacking(findings)
    if as_json:
        _print_json(findings, missing)
    else:
        _print_table(findings)
        click.echo(_verdict(missing))
    context.exit(REFUSED if missing else 0)


def lacking(findings: Sequence["Finding"]) -> list[str]:
    """Return the missing features without which migration cannot work."""
    there = {finding.name for finding in findings if finding.available}
    missing = []
    if not there.intersection(_WAYS_TO_OPEN):
        missing.append("userfaultfd")
    elif _PLACING not in there:
        missing.append(_PLACING)
    if not any(there.issuperset(way) for way in _TRACKING):
        missing.append("dirty tracking (PAGEMAP_SCAN or KVM)")
    return missing


def _verdict(missing: Sequence[str]) -> str:
    if missing:
        return f"Migration cannot work here: no {' and no '.join(missing)}; see the cures above."
    return "Migration works here: precopy and postcopy."


def _print_json(findings: Sequence["Finding"], missing: Sequence[str]) -> None:
    from dataclasses import asdict

    answer = {
        "can_migrate": not missing,
        "missing": list(missing),
        "findings": [asdict(finding) for finding in findings],
    }
    click.echo(json.dumps(answer, indent=2))


def _print_table(findings: Sequence["Finding"]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = click.style("yes", "green") if finding.available else click.style("no ", "red")
        click.echo(f"{mark}  {finding.name:<{width}}  {finding.detail}")
        if finding.cure:
            # On a line of its own, so that it can be copied.
            click.echo(f"     {'to cure:':>{width}}  {click.style(finding.cure, bold=True)}")
