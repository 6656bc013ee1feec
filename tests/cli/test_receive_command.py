"""``postcopy receive`` as a user has it."""

import json
import signal
import subprocess

import pytest

from fakes.commands import DEADLINE_S, POSTCOPY, one_line, postcopy
from fakes.precopy import PAGES, precopy
from fakes.receiving import send


@pytest.fixture
def start(tmp_path):
    """``start(options)``: a command that waits for a source at a socket."""
    started = []

    def begin(*options):
        line = [*POSTCOPY, "receive", f"unix:{tmp_path / 'm'}", str(tmp_path / "image"), *options]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert "waiting for a migration to unix:" in process.stdout.readline()
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def end(process):
    """Its standard output and error."""
    return process.communicate(timeout=DEADLINE_S)


def test_an_image_arrives(start, tmp_path):
    process = start("--json")
    send([precopy(answered=True)], f"unix:{tmp_path / 'm'}")
    lines, error = end(process)
    assert (process.returncode, error) == (0, "")
    result = json.loads(lines.splitlines()[-1])
    assert (result["event"], result["status"]) == ("result", "completed")
    assert (result["machine"], result["pages"]) == ("microvm", PAGES)
    assert postcopy("verify", str(tmp_path / "image")).returncode == 0
    assert not (tmp_path / "m").exists()


def test_what_a_user_sees(start, tmp_path):
    process = start()
    send([precopy()], f"unix:{tmp_path / 'm'}")
    lines, error = end(process)
    assert (process.returncode, error) == (0, "")
    assert f"image       {tmp_path / 'image'} (mapped-ram)" in lines
    assert f"pages       {PAGES} with data, 1 zero" in lines


def test_a_wrong_stream_is_one_line(start, tmp_path):
    process = start("--json")
    send([precopy()[:-9] + b"{"], f"unix:{tmp_path / 'm'}")
    lines, error = end(process)
    assert process.returncode == 1
    assert len(error.splitlines()) == 1
    assert "Unknown savevm section or instance 'unheard-of' 3" in error
    assert json.loads(lines.splitlines()[-1])["status"] == "failed"
    assert not (tmp_path / "image").exists()


@pytest.mark.parametrize(("number", "sent"), [(signal.SIGTERM, 0), (signal.SIGINT, 100_000)])
def test_it_is_given_up(start, tmp_path, number, sent):
    process = start()
    if sent:
        send([precopy()[:sent]], f"unix:{tmp_path / 'm'}")
    process.send_signal(number)
    _, error = end(process)
    assert process.returncode == 1
    assert len(error.splitlines()) == 1, error
    assert [each.name for each in tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["unix:m", "."], "is a folder"),
        (["unix:m", "no/image"], "is no folder"),
        (["carrier:pigeon", "image"], "unknown migration protocol: carrier:pigeon"),
        (["fd:name", "image"], "File descriptor named 'name' has not been found"),
    ],
)
def test_refused_at_once(tmp_path, arguments, text):
    outcome = postcopy("receive", *arguments, cwd=tmp_path)
    assert outcome.returncode == 3
    assert text in one_line(outcome)
    assert list(tmp_path.iterdir()) == []
