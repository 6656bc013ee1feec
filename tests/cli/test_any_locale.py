"""Names of files are UTF-8 in a process of any locale, as they are in QMP and in streams."""

import os

import pytest

from fakes.commands import Running, postcopy

ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
UTF8 = {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
NAME = "\u00fc-\u65e5".encode()


def in_locale(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.kvm
@pytest.mark.parametrize(("machine", "command"), [(ASCII, UTF8), (UTF8, ASCII), (ASCII, ASCII)])
def test_a_machine_and_a_command_mean_the_same_file(tmp_path, monkeypatch, machine, command):
    image = os.fsencode(tmp_path) + b"/" + NAME
    in_locale(monkeypatch, machine)
    with Running(tmp_path, "guest", "--workload", "idle") as guest:
        in_locale(monkeypatch, command)
        taken = postcopy("snapshot", "--from", guest.qmp, image)
        assert (taken.returncode, taken.stderr) == (0, "")
    assert {NAME, NAME + b".manifest.json"} < {
        os.fsencode(each.name) for each in tmp_path.iterdir()
    }
    verified = postcopy("verify", image)
    assert (verified.returncode, verified.stderr) == (0, "")


@pytest.mark.parametrize("command", [ASCII, UTF8])
def test_a_name_that_the_locale_has_no_letters_for_is_printed(tmp_path, monkeypatch, command):
    in_locale(monkeypatch, command)
    missing = postcopy("verify", os.fsencode(tmp_path) + b"/\xff" + NAME)
    assert missing.returncode == 1
    assert missing.stderr.isascii() == (command is ASCII)
    assert "No such file" in missing.stderr
