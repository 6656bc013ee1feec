"""``postcopy --install-completion``: click's completion, where the user's shell looks for it."""

import os
from pathlib import Path
from typing import Final

import click

from postcopy.errors import Refused

_FOR_THIS_SHELL: Final = "this"
_PROGRAM: Final = "postcopy"
_VARIABLE: Final = "_POSTCOPY_COMPLETE"
"""In the environment of a call that completes; click makes the name of the program's."""

_PLACES: Final = {
    "bash": ("XDG_DATA_HOME", ".local/share", "bash-completion/completions/postcopy"),
    "zsh": ("XDG_DATA_HOME", ".local/share", "zsh/site-functions/_postcopy"),
    "fish": ("XDG_CONFIG_HOME", ".config", "fish/completions/postcopy.fish"),
}
"""For each shell the variable of a folder, its default below the home folder, and the file below it."""

_NEEDS: Final = {
    "bash": "new shells have it if Debian's bash-completion, or the like, is set up",
    "zsh": "new shells have it if ~/.zshrc says 'fpath+=({folder})' before 'compinit'",
    "fish": "new shells have it",
}


def _install(context: click.Context, _parameter: click.Parameter, shell: str | None) -> None:
    """Write the file, say where, and exit.

    :raises Refused: the shell is not known, or the file cannot be written.
    """
    if shell is None or context.resilient_parsing:
        return
    if shell == _FOR_THIS_SHELL:
        shell = Path(os.environ.get("SHELL", "")).name
    if shell not in _PLACES:
        raise Refused(
            f"--install-completion: no completion for the shell {shell!r}; give one of {', '.join(_PLACES)}"
        )
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None
    variable, default, below = _PLACES[shell]
    folder = os.environ.get(variable) or Path.home() / default
    path = Path(folder, below)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made(context.command, {}, _PROGRAM, _VARIABLE).source())
    except OSError as error:
        cure = f"set {variable} to a folder that can be written"
        raise Refused(f"--install-completion: {path}: {error.strerror}; {cure}") from error
    click.echo(f"{path}: {_NEEDS[shell].format(folder=path.parent)}")
    context.exit()


INSTALL: Final = click.option(
    "--install-completion",
    is_flag=False,
    flag_value=_FOR_THIS_SHELL,
    metavar="[bash|zsh|fish]",
    is_eager=True,
    expose_value=False,
    callback=_install,
    help="Complete commands and options in a shell; default: that of SHELL.",
)
"""The option of ``postcopy`` itself."""
