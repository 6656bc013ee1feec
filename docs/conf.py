"""Settings of Sphinx, which makes the documentation site of the pages here: ``make docs``."""

import importlib.metadata
import os
import re
from pathlib import Path

from sphinx.application import Sphinx

project = "postcopy"
version = release = importlib.metadata.version("postcopy")
html_title = f"postcopy {release}"
copyright = ""  # noqa: A001 - Sphinx' name
html_show_copyright = False

extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
exclude_patterns = ["README.md"]  # the index of those who read the files themselves
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
pygments_style = "default"
suppress_warnings = ["misc.highlighting_failure"]  # output in a block of a console is no shell

_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)\s]*)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def _link_sources(app: Sphinx, page: str, source: list[str]) -> None:
    """Make a link that leaves this folder one to a copy of the file; to a folder, its text."""
    folder = Path(app.srcdir, page).parent

    def replaced(found: re.Match[str]) -> str:
        text, target = found.groups()
        path = Path(os.path.normpath(folder / target.partition("#")[0]))
        if path.is_relative_to(app.srcdir):
            return found[0]
        if not path.is_file():
            return text
        return f"{{download}}`{text.replace('`', '')} <{target.partition('#')[0]}>`"

    parts = _FENCE.split(source[0])
    source[0] = "".join(
        part if part.startswith("```") else _LINK.sub(replaced, part) for part in parts
    )


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _link_sources)
