"""The page in a real browser: it draws a migration as it happens, for every screen and every user."""

import contextlib
import dataclasses
import re
import subprocess

import pytest

from fakes.commands import POSTCOPY, pair, postcopy
from fakes.pair import NEVER_ENDS
from fakes.waiting import wait_until
from fakes.watching import HEADER, browser_program, record, samples
from postcopy.statistics import WAIT_CAUSES
from postcopy.watch.recording import Header

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the package playwright: run make venv"
)
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser():
    program = browser_program()
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=program, chromium_sandbox=False)
        yield found
        found.close()


class Pages:
    """Opens pages, and notes each request and each error of theirs."""

    def __init__(self, browser):
        self._browser = browser
        self.contexts = []
        self.requests = []
        self.errors = []

    def open(self, url, width=1280, scheme="light"):
        context = self._browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._said)
        page.goto(url)
        return page

    def _said(self, message):
        if "ERR_" not in message.text:  # the server has ended
            self.errors.append(message.text)


@pytest.fixture
def pages(browser):
    made = Pages(browser)
    yield made
    for context in made.contexts:
        context.close()
    assert made.errors == []


@pytest.fixture
def report(tmp_path):
    """The URL of a report of a run that never was."""
    return report_of(tmp_path, samples())


def report_of(folder, made, header=HEADER):
    path = record(folder / "run", made, header)
    outcome = postcopy("report", str(path), "-o", str(folder / "report.html"))
    assert outcome.returncode == 0, outcome.stderr
    return f"file://{folder}/report.html"


@contextlib.contextmanager
def serving(*arguments):
    """``postcopy watch --serve``: the process, and the URL."""
    line = [*POSTCOPY, "watch", "--serve", "127.0.0.1:0", *arguments]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        said = process.stdout.readline()
        yield process, re.search(r"http://127\.0\.0\.1:\d+/", said)[0]
    finally:
        process.kill()
        process.communicate()


def exact(page, name):
    """The exact value behind a figure."""
    return page.locator(f"[data-name={name}]").get_attribute("data-value", timeout=WAIT_MS)


def colours(page, canvas):
    """How many different colours a canvas shows."""
    return page.evaluate(
        """(id) => {
          const canvas = document.getElementById(id);
          const bytes = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          return new Set(new Uint32Array(bytes.buffer)).size;
        }""",
        canvas,
    )


def wait_status(page, status):
    page.locator("[data-name=status]", has_text=re.compile(f"^{status}$")).wait_for(timeout=WAIT_MS)


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_a_migration_as_it_happens_and_the_end_of_both_machines(tmp_path, pages):
    with pair(tmp_path, "hammer") as (source, target):
        names = ["postcopy-ram", "postcopy-blocktime"]
        for side in (source, target):
            side.ask(
                "migrate-set-capabilities",
                capabilities=[{"capability": name, "state": True} for name in names],
            )
        limits = {**NEVER_ENDS, "max-postcopy-bandwidth": 16 << 20}
        source.ask("migrate-set-parameters", **limits)
        with serving("--from", source.qmp, "--to", target.qmp) as (process, url):
            page = pages.open(url)
            wait_status(page, "none")
            assert page.locator("#map").get_attribute("aria-label").endswith("at-source 64 MiB")
            target.ask("migrate-incoming", uri=f"unix:{tmp_path}/way")
            source.ask("migrate", uri=f"unix:{tmp_path}/way")
            wait_status(page, "active")
            page.locator("[data-state=in-place], [data-state=zero]").first.wait_for(timeout=WAIT_MS)
            assert "precopy: memory is sent" in page.locator("#words").inner_text()
            source.ask("migrate-start-postcopy")
            wait_status(page, "completed")
            info, there = (
                source.ask("query-migrate")["return"],
                target.ask("query-migrate")["return"],
            )
            assert exact(page, "transferred_bytes") == str(info["ram"]["transferred"])
            assert exact(page, "total_bytes") == str(info["ram"]["total"])
            assert exact(page, "remaining_bytes") == str(info["ram"]["remaining"])
            assert exact(page, "faults") == str(info["ram"]["postcopy-requests"])
            assert (
                float(exact(page, "downtime_ms")) == info["x-postcopy"]["guest-downtime-us"] / 1000
            )
            measured = there["x-postcopy"]
            assert exact(page, "blocktime_0") == str(measured["blocktime-us"][0])
            waited = page.locator("[data-cause=page_0]").get_attribute("data-value")
            assert waited == str(measured["blocktime-causes-us"]["page"][0])
            assert exact(page, "p99_us") == str(measured["fault-latency-p99-us"])
            statuses = page.locator("#statuses").inner_text()
            assert statuses.index("active") < statuses.index("postcopy-active")
            assert colours(page, "map") >= 2
            assert colours(page, "heat") > 2
            # Both machines end; the page keeps what it has, and a late browser gets all of it.
            source.process.kill()
            target.process.kill()
            late = pages.open(url)
            wait_status(late, "completed")
            assert late.locator("#statuses").inner_text() == statuses
            assert "the run has ended" in late.locator("#notes").inner_text()
            assert process.poll() is None
            assert all(request.startswith(url) for request in pages.requests), pages.requests


@pytest.mark.kvm
def test_a_machine_that_ends_in_the_midst_is_named(tmp_path, pages):
    with (
        pair(tmp_path) as (source, target),
        serving("--from", source.qmp, "--to", target.qmp) as (process, url),
    ):
        page = pages.open(url)
        wait_status(page, "none")
        target.process.kill()
        note = page.locator("#notes", has_text="the destination at")
        note.wait_for(timeout=WAIT_MS)
        source.process.kill()
        page.locator("#notes", has_text="the run has ended").wait_for(timeout=WAIT_MS)
        process.kill()
        assert exact(page, "status") == "none"


def test_it_tries_again_when_its_server_has_ended(tmp_path, pages):
    run = record(tmp_path / "run", samples())
    with serving(str(run), "--speed", "0.01") as (process, url):
        page = pages.open(url)
        wait_status(page, "setup")
        process.kill()
        page.locator("#notes", has_text="this page tries again").wait_for(timeout=WAIT_MS)


def test_each_cause_of_a_wait_has_its_colour_and_its_words(tmp_path, pages):
    causes = {name: (10_000 * (n + 1),) for n, name in enumerate(WAIT_CAUSES)}
    made = samples(vcpus=1)
    last = dataclasses.replace(
        made[-1], blocktime_us=(sum(us for (us,) in causes.values()),), blocktime_causes_us=causes
    )
    page = pages.open(report_of(tmp_path, [made[0], last]))
    wait_status(page, "completed")
    rows = page.locator("#causes tbody tr").all_inner_texts()
    assert [text.split("\t")[0] for text in rows] == [
        f"{name}: {meaning}" for name, meaning in WAIT_CAUSES.items()
    ]
    marks = page.locator("#causes .mark").evaluate_all(
        "(all) => all.map((each) => getComputedStyle(each).backgroundColor)"
    )
    assert len(set(marks)) == len(WAIT_CAUSES)
    assert "rgba(0, 0, 0, 0)" not in marks
    # As much of each as there is room for, and the text and what lies between.
    assert colours(page, "vcpus") > len(WAIT_CAUSES)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1920])
def test_sizes_and_colours(report, pages, width, scheme):
    page = pages.open(report, width, scheme)
    wait_status(page, "completed")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [
        page.locator(f"#{name}").bounding_box() for name in ("map", "rates", "figures", "heat")
    ]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    assert all(box["width"] > 250 and box["height"] > 100 for box in boxes)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)))
    assert (brightness > 600) is (scheme == "light")
    assert contrast(page, "#words") >= 4.5
    assert contrast(page, "#who") >= 4.5
    for canvas in ("map", "rates", "faults", "heat", "vcpus"):
        assert colours(page, canvas) > 1, canvas


def test_what_many_vcpus_wait_for_fits_a_narrow_screen(tmp_path, pages):
    page = pages.open(report_of(tmp_path, samples(vcpus=16)), 360)
    wait_status(page, "completed")
    assert page.locator("#causes thead th").count() == 9
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def contrast(page, element):
    """WCAG's contrast of a text with its ground."""
    found = page.evaluate(
        """(name) => [getComputedStyle(document.querySelector(name)).color,
             getComputedStyle(document.body).backgroundColor]""",
        element,
    )
    lights = []
    for colour in found:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_with_the_keyboard_alone(report, pages):
    page = pages.open(report)
    wait_status(page, "completed")
    order = []
    for _ in range(4):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert order[:3] == ["skip", "moment", "now"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Home")
    wait_status(page, "setup")
    page.keyboard.press("ArrowRight")
    wait_status(page, "active")
    assert page.locator("#moment").get_attribute("aria-valuetext") == "0.3 s"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_status(page, "completed")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#past tbody tr").first.wait_for(timeout=WAIT_MS)
    assert page.locator("#past tbody tr").count() == 5


def test_what_a_screen_reader_is_told(report, pages):
    page = pages.open(report)
    wait_status(page, "completed")
    tree = page.locator("body").aria_snapshot()
    for line in (
        'heading "Migration" [level=1]',
        'status: "completed: memory is sent;',
        'progressbar "progress of the migration"',
        'slider "Moment"',
        'button "Newest"',
        'img "map of the memory, as the source says it: in-place 64 MiB"',
        'img "bandwidth 12.0 MiB/s, dirty rate 5.0 MiB/s"',
        'img "latency of faults: half took no longer than 0.20 ms',
        'table "Figures of the shown moment"',
        'row "remaining 0.0 MiB"',
        'table "Memory by state"',
        'img "vCPU 0 has waited 72.00 ms, page 40.00 ms, paused 32.00 ms; vCPU 1 has waited',
        "stopped for the switch-over: 3.3 ms",
        'table "Blocktime by cause"',
        'row "paused: the connection is broken 32.00 ms 32.00 ms"',
        'region "Statuses"',
    ):
        assert line in tree, tree
    assert page.locator("[aria-live=polite]").count() == 1


def test_a_report_loads_nothing_and_runs_nothing_of_its_file(tmp_path, pages):
    evil = "</script><img src=x onerror='document.title=1'><script>document.title=2</script>"
    made = samples()
    header = Header(evil, "unix:b", HEADER.began)
    made = [dataclasses.replace(each, source=evil, notes=(evil,), status=evil) for each in made]
    page = pages.open(report_of(tmp_path, made, header))
    page.locator("#notes li").first.wait_for(timeout=WAIT_MS)
    assert page.locator("#notes li").first.inner_text() == evil
    assert page.title() == "Migration"
    assert len(pages.requests) == 1


def test_without_a_map_the_page_says_so(tmp_path, pages):
    made = [dataclasses.replace(each, map=None) for each in samples()]
    page = pages.open(report_of(tmp_path, made))
    wait_status(page, "completed")
    assert "does not tell where its pages are" in page.locator("#no-map").inner_text()
    assert not page.locator("#map").is_visible()


def at_each_moment(page):
    """What the page shows of a run that has ended, moment by moment."""
    page.locator("#notes", has_text="the run has ended").wait_for(timeout=WAIT_MS)
    page.locator("#moment").focus()
    page.keyboard.press("Home")
    shown = []
    for number in range(int(page.locator("#moment").get_attribute("max")) + 1):
        drawn = """(n) => document.getElementById("moment").ariaValueText === `${(n / 4).toFixed(1)} s`"""
        page.wait_for_function(drawn, arg=number)
        parts = ("#figures", "#states", "#causes", "#statuses")
        labels = [page.locator(f"#{each}").get_attribute("aria-label") for each in ("map", "rates")]
        shown.append([*labels, *(page.locator(each).inner_text() for each in parts)])
        page.keyboard.press("ArrowRight")
    return shown


def test_a_page_that_is_opened_late_shows_the_past(tmp_path, pages):
    run = record(tmp_path / "run", samples())
    with serving(str(run), "--speed", "20") as (_, url):
        early = pages.open(url)
        shown = at_each_moment(early)
        assert len(shown) == len(samples())
        assert shown[4][0].startswith("map of the memory, as the source says it: at-source 50 MiB")
        assert at_each_moment(pages.open(url)) == shown
        early.reload()
        assert at_each_moment(early) == shown


def test_a_recorded_run_is_played(tmp_path, pages):
    run = record(tmp_path / "run", samples())
    with serving(str(run), "--speed", "50") as (_, url):
        page = pages.open(url)
        wait_status(page, "completed")
        assert page.locator("#statuses li").count() == 5
        wait_until(lambda: "ended" in page.locator("#notes").inner_text(), 10, "the end")
