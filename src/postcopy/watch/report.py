"""Makes one self-contained page of a recorded run: it loads nothing, and may be handed on."""

import base64
import hashlib
import json
from typing import TYPE_CHECKING, Final

from postcopy.watch.past import thinned
from postcopy.watch.server import page_file

if TYPE_CHECKING:
    from postcopy.watch.recording import Recording

_STYLE: Final = '<link rel="stylesheet" href="watch.css">'
_SCRIPT: Final = '<script type="module" src="watch.js"></script>'


def page_of(found: "Recording") -> str:
    """The page; its policy lets run the script that is in it, and load nothing."""
    style, script = page_file("watch.css"), page_file("watch.js")
    policy = (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src {_hash(style)}; "
        f"script-src {_hash(script)}"
    )
    data = {
        "header": found.header.to_json(),
        "samples": [sample.to_json() for sample in thinned(found.samples)],
    }
    # '<' only stands in strings of JSON: so no text in them ends the element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    whole = page_file("index.html")
    for mark, instead in (
        (
            "<head>",
            f'<head>\n<meta http-equiv="Content-Security-Policy" content="{policy}">',
        ),
        (_STYLE, f"<style>{style}</style>"),
        (
            _SCRIPT,
            f'<script type="application/json" id="recorded">{text}</script>\n'
            f'<script type="module">{script}</script>',
        ),
    ):
        before, found_mark, after = whole.partition(mark)
        assert found_mark, mark
        whole = before + instead + after
    return whole


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
