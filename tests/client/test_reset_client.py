"""Resets from Python, of real processes."""

import asyncio

import pytest

from postcopy import Machine, Reason, Refused, sync

pytestmark = pytest.mark.kvm


def test_back_to_a_moment(guest):
    async def go_back():
        async with Machine.connect(guest.qmp) as machine:
            await machine.stop()
            point = await machine.reset_point()
            then = await machine.read_memory(0, 32 << 20)
            for _ in range(3):
                await machine.cont()
                while await machine.read_memory(0x20000, 0x20000) == then[0x20000:0x40000]:
                    pass
                await machine.stop()
                reset = await machine.reset()
                assert await machine.read_memory(0, 32 << 20) == then
            await machine.cont()
            await machine.reset()
            assert await machine.run_state() == "running"
            await machine.reset_end()
            with pytest.raises(Refused, match="there is no reset point"):
                await machine.reset()
        return point, reset

    point, reset = asyncio.run(go_back())
    assert point.copied_bytes > 0
    assert (reset.pages > 0, reset.us > 0, reset.whole) == (True, True, False)


def test_back_to_a_snapshot_without_async(guest, tmp_path):
    with sync.Machine.connect(guest.qmp) as machine:
        machine.snapshot(tmp_path / "image")
        machine.reset_point(tmp_path / "image")
        with pytest.raises(Refused, match="x-reset-end"):
            machine.snapshot(tmp_path / "another")
        assert machine.reset().whole
        assert not machine.reset().whole
        machine.reset_end()
        machine.snapshot(tmp_path / "another")
        assert machine.run_state() == "running"


def test_a_point_lasts_as_long_as_its_context(guest):
    async def go_back():
        async with Machine.connect(guest.qmp) as machine:
            async with machine.reset_point() as point:
                assert point.copied_bytes > 0
                assert (await point.reset()).pages > 0
                with pytest.raises(Refused) as said:
                    await machine.migrate("tcp:127.0.0.1:1")
                assert said.value.reason is Reason.STATE
            with pytest.raises(Refused, match="there is no reset point"):
                await point.end()
            await point.close()  # harmless

    asyncio.run(go_back())
    with sync.Machine.connect(guest.qmp) as machine:
        with machine.reset_point() as point:
            assert not point.reset().whole
        with pytest.raises(Refused, match="there is no reset point"):
            machine.reset()


def test_what_cannot_be_is_said(guest, tmp_path):
    (tmp_path / "image").write_bytes(b"something else")
    with sync.Machine.connect(guest.qmp) as machine:
        with pytest.raises(Refused, match="image"):
            machine.reset_point(tmp_path / "image")
        with pytest.raises(Refused, match="there is no reset point"):
            machine.reset_end()
        assert machine.run_state() == "running"
