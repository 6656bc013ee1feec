"""A machine that cannot even be started."""

import asyncio
import subprocess
import tempfile

import pytest

from postcopy import CannotConnect, Machine


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


async def start():
    await Machine.start()


def test_nothing_is_left_of_it(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", full)
    with pytest.raises(CannotConnect) as failed:
        asyncio.run(start())
    assert str(failed.value) == "cannot start 'postcopy run': Resource temporarily unavailable"
    assert not list(folder.iterdir())
