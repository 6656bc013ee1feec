"""Write ``docs/tracing.md`` from the table of trace points; ``--check`` only says whether it is current."""

import pathlib
import sys

from postcopy import trace

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "tracing.md"
HEAD = """\
# What happens, step by step

Drawn by `scripts/draw_tracing.py` from the tables in [`trace.py`](../src/postcopy/trace.py); do not
edit it here.

```console
postcopy run --workload hammer --trace steps.jsonl --qmp unix:s.sock
```

`--trace FILE` (of `run` and `restore`; `trace=` in Python) has the machine's process and each of its
engines append a line of JSON to FILE at each step: `time_ns` since 1970, the process `pid`, the `point`,
and what belongs to it. Both sides may write to one file. Without it a step costs a few
microseconds.

```json
{"time_ns": 1764486000123456789, "pid": 4711, "point": "source.package-sent", "bytes": 5120}
```

`POSTCOPY_TRACE_CALL=module:function` in the environment has that function called with the point and its
fields, in the thread that takes the step, before it goes on. The project's own tests let engines die and
wait so, at each step below ([`trace_hooks.py`](../tests/faults/trace_hooks.py)).
"""
GROUPS = {
    "GUEST": "The guest's process",
    "SOURCE": "A source, before the hand-over",
    "SOURCE_PRECOPY": "A source that hands over at the end of precopy",
    "SOURCE_POSTCOPY": "A source that hands over for postcopy",
    "SOURCE_RECOVERY": "A source that recovers",
    "DESTINATION": "A destination",
    "DESTINATION_PRECOPY": "A destination of a precopy",
    "DESTINATION_POSTCOPY": "A destination of a postcopy",
    "DESTINATION_RECOVERY": "A destination that recovers",
    "SNAPSHOT": "A background snapshot",
    "RESTORE_LAZY": "A lazy restore",
    "RESTORE_RECORDING": "A lazy restore that records its working set",
    "RESTORE_EAGER": "A restore of all memory first",
    "RESET_POINT": "A reset point is set",
    "RESET": "A reset",
}


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_group(name, title) for name, title in GROUPS.items())


def _group(name: str, title: str) -> str:
    rows = [f"| `{point}` | {meaning} |\n" for point, meaning in getattr(trace, name).items()]
    return f"\n## {title}\n\n| point | |\n| --- | --- |\n{''.join(rows)}"


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit(f"{PAGE.name} is not what the tables say: run scripts/draw_tracing.py")
