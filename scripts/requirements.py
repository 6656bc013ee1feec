"""Print what to install for development: pyproject's group ``dev``, and the software CPU.

pip understands ``--group`` only from 25.1 on, and older ones are common.
"""

import pathlib
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
wanted = (
    settings["dependency-groups"]["dev"] + settings["project"]["optional-dependencies"]["unicorn"]
)
print("\n".join(wanted))
