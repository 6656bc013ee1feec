"""Run ``postcopy demo``, record it, and take a picture of its report: ``docs/watch.png``, in the README."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parent.parent / "docs" / "watch.png"
WIDTH, HEIGHT = 1520, 900


def browser_program() -> Path:
    """Where ``.ci/install-browser`` has put it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    home = os.environ.get("POSTCOPY_BROWSER") or Path(cache) / "postcopy/browser"
    return Path(home) / "debian/bin/chromium-headless-shell"


def best_moment(run: Path) -> int:
    """The number of the sample at which most happens: half-way through the postcopy."""
    lines = [json.loads(line) for line in run.read_text().splitlines()[1:]]
    during = [n for n, line in enumerate(lines) if line["phase"] == "postcopy" and line["map"]]
    return during[len(during) // 2] if during else len(lines) // 2


def main() -> None:
    """Draw it."""
    postcopy = [sys.executable, "-m", "postcopy"]
    with tempfile.TemporaryDirectory() as folder:
        run, report = Path(folder) / "run.jsonl", Path(folder) / "report.html"
        subprocess.run([*postcopy, "demo", "--record", str(run)], check=True)
        subprocess.run([*postcopy, "report", str(run), "-o", str(report)], check=True)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=browser_program(), chromium_sandbox=False
            )
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(f"file://{report}")
            page.locator("#figures td").first.wait_for()
            page.locator("#moment").fill(str(best_moment(run)))
            page.locator("#moment-text", has_not_text="newest").wait_for()
            page.evaluate("() => new Promise((done) => requestAnimationFrame(() => done()))")
            page.locator("#moment").blur()
            page.screenshot(path=PICTURE, full_page=True)
            browser.close()
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
