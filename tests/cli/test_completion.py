"""Completion in the user's shell: installed by a command, and asked as the shell asks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.commands import DEADLINE_S, one_line, postcopy

BIN = Path(sys.executable).parent
PLACES = {
    "bash": ".local/share/bash-completion/completions/postcopy",
    "zsh": ".local/share/zsh/site-functions/_postcopy",
    "fish": ".config/fish/completions/postcopy.fish",
}


@pytest.fixture
def home(tmp_path):
    """The environment of a user whose home folder is empty."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    return kept | {"HOME": str(tmp_path), "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.mark.parametrize("shell", PLACES)
def test_it_lies_where_the_shell_looks(tmp_path, home, shell):
    outcome = postcopy("--install-completion", shell, env=home)
    assert outcome.returncode == 0, outcome.stderr
    path = tmp_path / PLACES[shell]
    assert outcome.stdout.startswith(f"{path}: new shells have it")
    assert f"_POSTCOPY_COMPLETE={shell}_complete" in path.read_text()


def test_the_shell_is_that_of_the_user(tmp_path, home):
    outcome = postcopy("--install-completion", env=home | {"SHELL": "/usr/bin/fish"})
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / PLACES["fish"]).exists()


def test_another_shell_and_a_folder_that_cannot_be_are_one_line(tmp_path, home):
    outcome = postcopy("--install-completion", env=home | {"SHELL": "/bin/dash"})
    assert "no completion for the shell 'dash'; give one of bash, zsh, fish" in one_line(outcome)
    (tmp_path / "file").touch()
    outcome = postcopy(
        "--install-completion", "bash", env=home | {"XDG_DATA_HOME": f"{tmp_path}/file"}
    )
    assert "Not a directory; set XDG_DATA_HOME" in one_line(outcome)


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("postcopy mig", {"migrate"}),
        ("postcopy migrate --within 5 --th", {"--then"}),
        ("postcopy run --workload ha", {"hammer"}),
        ("postcopy tls i", {"init"}),
    ],
)
def test_bash_completes(tmp_path, home, typed, found):
    assert postcopy("--install-completion", "bash", env=home).returncode == 0
    script = (
        f"source {tmp_path / PLACES['bash']}; COMP_WORDS=({typed}); "
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _postcopy_completion postcopy; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    outcome = subprocess.run(
        ["bash", "--norc", "-c", script], env=home, capture_output=True, text=True,
        timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert (set(outcome.stdout.split()), outcome.stderr) == (found, "")
