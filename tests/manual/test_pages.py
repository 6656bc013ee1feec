"""The manual as a reader gets it: a site, man pages, and commands that the command line has."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from postcopy.cli import COMMANDS
from postcopy.cli.command_line import cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^ *```(?:console|sh)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
DEADLINE_S = 110


def run(*command):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S,
        check=False,
    )  # fmt: skip


def commands_of(page):
    """The words of each call of postcopy in the blocks of a page."""
    for block in BLOCK.findall(page.read_text()):
        for shown in block.replace("\\\n", " ").splitlines():
            line = shown.strip().removeprefix("$ ")
            if line.startswith("postcopy ") and "..." not in line:
                words = shlex.split(line, comments=True)
                stop = next(
                    (n for n, word in enumerate(words) if word in {"|", "||", "&", ">", "<"}), None
                )
                yield words[1:stop]


@pytest.mark.parametrize(
    "page", [path.relative_to(DOCS) for path in sorted(DOCS.rglob("*.md"))], ids=str
)
def test_the_commands_of_a_page_are_those_of_the_command_line(page):
    for words in commands_of(DOCS / page):
        command, context = cli, click.Context(cli, info_name="postcopy")
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            command = command.get_command(context, words[0])
            assert command is not None, f"{page}: no command {words[0]}"
            context = click.Context(command, info_name=words.pop(0), parent=context)
        if "--help" not in words:
            try:
                command.make_parser(context).parse_args(words)
            except click.UsageError as error:
                pytest.fail(f"{page}: {error.format_message()}")


def test_pages_have_commands():
    assert len(list(commands_of(DOCS / "howto" / "evacuate.md"))) >= 4
    assert sum(len(list(commands_of(path))) for path in DOCS.rglob("*.md")) > 40


def test_each_command_has_a_man_page_with_each_of_its_options(tmp_path):
    outcome = run("scripts/make_man.py", str(tmp_path))
    assert outcome.returncode == 0, outcome.stderr
    assert "\\fBvhost-user-blk\\fP" in (tmp_path / "postcopy.1").read_text()
    for name in COMMANDS:
        text = (tmp_path / f"postcopy-{name}.1").read_text()
        command = cli.get_command(click.Context(cli), name)
        plain = text.replace("\\-", "-")
        for option in (each for each in command.params if isinstance(each, click.Option)):
            assert all(each in plain for each in option.opts), (name, option.opts)
            assert option.help, (name, option.opts)
        requests = {line.split()[0] for line in text.splitlines() if line.startswith((".", "'"))}
        assert requests <= {".TH", ".SH", ".B", ".PP", ".TP", ".br"}, name
        assert "\b" not in text


def test_the_site_is_built_without_a_warning(tmp_path):
    """A link that leads nowhere, a page that no table of contents has and a bad docstring are warnings."""
    outcome = run(
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        f"{tmp_path}/trees",
        "docs",
        f"{tmp_path}/site",
    )
    assert (outcome.returncode, outcome.stderr) == (0, "")
    site = tmp_path / "site"
    assert 'id="postcopy.Machine.migrate"' in (site / "python.html").read_text()
    assert 'id="postcopy-migrate"' in (site / "cli.html").read_text()
    loaded = re.compile(
        r"""<(?:script|img|iframe|source)\b[^>]*?\bsrc=["']?(?:https?:)?//[^>]*>|"""
        r"""<link\b[^>]*?\bhref=["']?(?:https?:)?//[^>]*>|\bimport\b[^;\n]*["']https?://"""
    )
    for page in site.rglob("*.html"):
        assert not loaded.findall(page.read_text()), page.name
