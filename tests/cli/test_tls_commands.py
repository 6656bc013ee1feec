"""``postcopy tls init``, and the commands that encrypt with what it has made."""

import json
import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from fakes.certificates import client
from fakes.commands import DEADLINE_S, POSTCOPY, Running, one_line, pair, postcopy
from fakes.pair import NEVER_ENDS
from fakes.precopy import precopy
from fakes.waiting import wait_until
from postcopy.channel.address import TcpAddress
from postcopy.channel.connect import connect
from postcopy.channel.tls_channel import secure

FILES = {"ca-cert.pem", "client-cert.pem", "client-key.pem", "server-cert.pem", "server-key.pem"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls") / "made"
    outcome = postcopy("tls", "init", str(folder))
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.splitlines() == [f"{folder}/source", f"{folder}/destination"]
    return folder


def test_what_init_makes(folders):
    assert {each.name for each in folders.iterdir()} == {
        *("ca-cert.pem", "ca-key.pem", "source", "destination")
    }
    for name in ("source", "destination"):
        assert {each.name for each in (folders / name).iterdir()} == FILES
    for folder, _, names in os.walk(folders):
        for name in names:
            mode = (Path(folder) / name).stat().st_mode
            assert stat.S_IMODE(mode) == 0o600


def test_what_init_refuses(folders, tmp_path):
    outcome = postcopy("tls", "init", str(folders))
    assert outcome.returncode == 3
    assert "is not empty" in one_line(outcome)
    outcome = postcopy("tls", "init", str(tmp_path / "new"), "../elsewhere")
    assert outcome.returncode == 3
    assert "is no host name" in one_line(outcome)
    assert not (tmp_path / "new").exists()


@pytest.mark.kvm
def test_run_and_migrate(folders, tmp_path):
    there = str(folders / "destination")
    with (
        Running(tmp_path, "source", "--workload", "idle") as source,
        Running(tmp_path, "target", "--incoming", "tcp:127.0.0.1:0", "--tls", there) as target,
    ):
        (found,) = target.ask("query-migrate")["return"]["socket-address"]
        uri = f"tcp:127.0.0.1:{found['port']}"
        plain = postcopy("migrate", "--from", source.qmp, uri)
        assert plain.returncode == 1
        assert "set tls-creds here too" in plain.stderr
        outcome = postcopy(
            "migrate",
            "--from",
            source.qmp,
            uri,
            "--tls",
            str(folders / "source"),
        )
        assert (outcome.returncode, outcome.stderr) == (0, "")
        assert target.ask("query-status")["return"]["status"] == "running"
        # The credentials of the order are gone with it.
        assert source.ask("query-migrate-parameters")["return"]["tls-creds"] == ""


@pytest.mark.kvm
def test_one_command_gives_both_sides_their_credentials(folders, tmp_path):
    with (
        Running(tmp_path, "source", "--workload", "idle") as source,
        Running(tmp_path, "target", "--incoming", "defer") as target,
    ):
        outcome = postcopy(
            *("migrate", "--from", source.qmp, "--to", target.qmp, f"unix:{tmp_path}/way"),
            *("--tls", str(folders / "source"), "--tls-hostname", "localhost"),
        )
        assert (outcome.returncode, outcome.stderr) == (0, "")


@pytest.mark.kvm
def test_a_recovery_gives_them_again(folders, tmp_path):
    with pair(tmp_path, "hammer") as (source, target):
        source.ask("migrate-set-parameters", **NEVER_ENDS, **{"max-postcopy-bandwidth": 256 << 10})
        sides = ["--from", source.qmp, "--to", target.qmp]
        tls = ["--tls", str(folders / "source"), "--tls-hostname", "localhost"]
        line = [*POSTCOPY, "migrate", "--json", *sides, *tls, "--postcopy", "now"]
        with subprocess.Popen(
            [*line, f"unix:{tmp_path}/way"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as command:
            looks = (json.loads(text) for text in iter(command.stdout.readline, ""))
            assert any(look.get("phase") == "postcopy" for look in looks)
            source.ask("migrate-pause")
            said = command.communicate(timeout=DEADLINE_S)[1]
            assert command.returncode == 4
        _, typed, _ = said.split("'")  # what the message says is what is typed
        assert shlex.split(typed) == ["postcopy", "recover", *sides, *tls]
        source.ask("migrate-set-parameters", **{"max-postcopy-bandwidth": 0})
        outcome = postcopy(*shlex.split(typed)[1:], f"unix:{tmp_path}/again")
        assert (outcome.returncode, outcome.stderr) == (0, "")
        for side in (source, target):
            assert side.ask("query-migrate-parameters")["return"]["tls-creds"] == ""


@pytest.mark.kvm
def test_an_object_of_the_command_line(folders, tmp_path):
    text = f"tls-creds-x509,id=mine,dir={folders / 'source'},endpoint=client,verify-peer=on"
    with Running(tmp_path, "source", "--workload", "idle", "--object", text) as source:
        taken = source.ask(
            "object-add", **{"qom-type": "authz-simple", "id": "mine", "identity": "x"}
        )
        assert "attempt to add duplicate property 'mine'" in taken["error"]["desc"]
        line = {
            "command-line": "object_add authz-list,id=a,rules.0.match=CN=x,,O=y,rules.0.policy=allow"
        }
        assert source.ask("human-monitor-command", **line)["return"] == ""
        assert source.ask("object-del", id="a")["return"] == {}
        assert "not found" in source.ask("object-del", id="a")["error"]["desc"]


def test_what_run_refuses(folders, tmp_path):
    for option, said in (
        (["--tls", str(tmp_path)], "Unable to access credentials"),
        (["--object", "secret,id=x"], "does not accept value 'secret'"),
        (["--object", f"tls-creds-psk,id=x,dir={tmp_path}"], "use certificates"),
        (["--object", "tls-creds-x509,id=x"], "Missing 'dir' property value"),
    ):
        outcome = postcopy("run", "--incoming", "defer", "--accel", "unicorn", *option)
        assert outcome.returncode == 3
        assert said in one_line(outcome)


@pytest.mark.parametrize(
    ("uri", "said"),
    [("tcp:0:0", True), ("tcp::0", True), ("tcp:127.0.0.1:0", False), ("tcp:localhost:0", False)],
)
def test_run_says_once_that_others_can_connect(uri, said, tmp_path):
    options = ("--accel", "unicorn", "--memory", "16M")
    with Running(tmp_path, "open", "--incoming", uri, *options) as running:
        running.ask("query-migrate")
        running.ask("quit")
        running.process.wait(DEADLINE_S)
    text = running.stderr
    assert text.count("nothing is encrypted; give --tls DIR") == int(said)
    assert len(text.splitlines()) == int(said)


def test_receive(folders, tmp_path):
    image = tmp_path / "image"
    line = [*POSTCOPY, "receive", "tcp:127.0.0.1:0", str(image), "--json"]
    line += ["--tls", str(folders / "destination")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        port = int(json.loads(process.stdout.readline())["text"].rpartition(":")[2])
        near = secure(
            connect(TcpAddress("127.0.0.1", port)), client(folders / "source"), "127.0.0.1"
        )
        with near:
            near.send(precopy(answered=True))
            room = memoryview(bytearray(4096))
            while near.receive_into(room):
                pass
        lines, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
    assert json.loads(lines.splitlines()[-1])["status"] == "completed"
    assert postcopy("verify", str(image)).returncode == 0


@pytest.mark.kvm
def test_serve(folders, tmp_path):
    image = tmp_path / "image"
    with Running(tmp_path, "source", "--workload", "idle") as source:
        assert postcopy("snapshot", "--from", source.qmp, str(image)).returncode == 0
    there = str(folders / "destination")
    with Running(tmp_path, "target", "--incoming", "defer", "--tls", there) as target:
        on = [{"capability": "postcopy-ram", "state": True}]
        target.ask("migrate-set-capabilities", capabilities=on)
        target.ask("migrate-incoming", uri="tcp:127.0.0.1:0")
        (found,) = target.ask("query-migrate")["return"]["socket-address"]
        uri = f"tcp:127.0.0.1:{found['port']}"
        outcome = postcopy("serve", str(image), uri, "--tls", str(folders / "source"))
        assert (outcome.returncode, outcome.stderr) == (0, "")
        wait_until(lambda: target.migration_status() == "completed")
