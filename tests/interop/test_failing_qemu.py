"""``failing``, which a source of QEMU 11.1 says before it says ``failed``."""

import asyncio

import pytest

from fakes.real_qemu import MICROVM, QemuProcess, bios
from postcopy import Machine, MigrationFailed


@pytest.mark.parametrize("uri", ["unix:{}/nobody", "exec:exit 3"])
@pytest.mark.qemu("10.0", "11.1")
def test_it_is_no_end_and_no_word_that_is_not_known(tmp_path, uri, request):
    async def move():
        async with Machine.connect(f"unix:{tmp_path}/qmp") as machine:
            with pytest.raises(MigrationFailed, match="the guest is at the source"):
                await (await machine.migrate(uri.format(tmp_path))).result()

    line = ["-accel", "tcg", "-M", MICROVM, "-m", "64M", *bios(tmp_path)]
    with QemuProcess(
        tmp_path, [*line, "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
    ) as source:
        asyncio.run(move())
        assert source("query-status")["status"] == "running"
        told = [e["data"]["status"] for e in source.events if e["event"] == "MIGRATION"]
        newest = "11.1" in request.node.name
        assert told[-2 if newest else -1 :] == (["failing", "failed"] if newest else ["failed"])
