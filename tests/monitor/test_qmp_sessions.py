"""What a QEMU of a few seconds cannot show: waiting commands, clients that leave, QEMU's own tools."""

import asyncio
import io
import json
import socket
import threading

import pytest
from qemu.qmp import QMPClient
from qemu.qmp.qmp_shell import QMPShell

from fakes.monitor_backend import make_backend
from postcopy.errors import CannotListen, Refused
from postcopy.monitor.hmp_console import HmpConsole
from postcopy.monitor.server import serve_hmp, serve_qmp
from postcopy.ownership import Move
from postcopy.statistics import MigrationInfo
from postcopy.status import Status

DEADLINE_SECONDS = 20


def test_out_of_band_while_a_page_is_missing(ours, connect, backend):
    ours.negotiate("oob")
    backend.machine.page_is_there.clear()
    backend.machine.reader_waits.clear()
    line = {"execute": "human-monitor-command", "arguments": {"command-line": "xp /1xb 0"}}
    ours.send({**line, "id": "waits"})
    assert backend.machine.reader_waits.wait(DEADLINE_SECONDS)
    pause = ours.ask({"exec-oob": "migrate-pause", "id": "at once"})
    assert pause["id"] == "at once"
    assert connect().negotiate().execute("query-status")["return"]["running"] is True
    backend.machine.page_is_there.set()
    assert ours.reply()["id"] == "waits"


def test_a_recovery_holds_up_nothing_out_of_band(ours, backend):
    ours.negotiate("oob")
    backend.migration.recovers.clear()
    ours.send({"exec-oob": "migrate-recover", "arguments": {"uri": "tcp:a:1"}, "id": "takes long"})
    assert ours.ask({"exec-oob": "migrate-pause", "id": "at once"})["id"] == "at once"
    backend.migration.recovers.set()
    answer = ours.reply()
    assert answer["id"] == "takes long"
    assert "only be run when postcopy is paused" in answer["error"]["desc"]


def test_answers_keep_the_order_of_requests(ours):
    ours.negotiate()
    requests = [{"execute": "query-status", "id": i} for i in range(200)]
    ours.send("".join(map(json.dumps, requests)).encode())
    assert [ours.reply()["id"] for _ in requests] == list(range(200))


def test_a_script_may_read_its_answers_after_its_last_request(ours):
    ours.negotiate()
    ours.send(b'{"execute": "query-status"}' * 20)
    ours.socket.shutdown(socket.SHUT_WR)
    assert [ours.reply()["return"]["running"] for _ in range(20)] == [True] * 20
    assert ours.socket.recv(1) == b""


def test_a_client_that_never_reads_is_cut_off_and_its_threads_end(ours, backend, server):
    ours.negotiate()
    before = {t for t in threading.enumerate() if t.name.startswith("qmp-")}
    assert before
    for _ in range(20000):
        backend.events.emit("MIGRATION", {"status": "x" * 100})
    for thread in before:
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive()


def test_events_go_to_negotiated_clients_only(ours, connect, backend):
    ours.negotiate()
    late = connect()
    backend.events.emit("MIGRATION", {"status": "active"})
    assert ours.read()["data"] == {"status": "active"}
    late.negotiate()
    backend.events.emit("MIGRATION_PASS", {"pass": 1})
    assert late.read()["event"] == "MIGRATION_PASS"


def test_mistakes_of_ours_do_not_reach_clients(ours, backend, caplog):
    ours.negotiate()
    backend.migration.breaks = True
    answer = ours.execute("migrate", uri="tcp:a:1")
    text = "internal error in migrate: ZeroDivisionError; see the log"
    assert answer == {"error": {"class": "GenericError", "desc": text}}
    assert ours.human("migrate -d tcp:a:1").startswith("Error: internal error: ZeroDivisionError")
    assert "a mistake of ours" in caplog.text


def test_a_client_that_leaves_in_the_middle_leaves_the_others_alone(ours, connect):
    gone = connect()
    gone.negotiate()
    gone.send(b'{"execute": "query-sta')
    gone.close()
    assert "return" in ours.negotiate().execute("query-status")


def test_quit_is_answered_and_close_flushes(ours, backend, server):
    ours.negotiate()
    assert ours.execute("quit") == {"return": {}}
    assert ours.events[0]["event"] == "SHUTDOWN"
    assert backend.machine.has_quit.is_set()
    server.close()
    assert ours.socket.recv(1) == b""


def test_quit_is_answered_although_it_closes_the_monitor(ours, backend, server):
    ours.negotiate()
    closer = threading.Thread(target=server.close)

    def quit_at_once():
        closer.start()
        closer.join(0.3)  # the monitor is closed before the answer is made, unless it waits for it

    backend.machine.quit = quit_at_once
    assert ours.execute("quit") == {"return": {}}
    closer.join(DEADLINE_SECONDS)


def test_pmemsave(ours, backend, tmp_path):
    backend.machine.ram[5:9] = b"page"
    ours.negotiate()
    path = str(tmp_path / "memory")
    assert ours.execute("pmemsave", val=4, size=6, filename=path) == {"return": {}}
    assert (tmp_path / "memory").read_bytes() == b"\0page\0"
    assert "no RAM" in ours.execute("pmemsave", val=1 << 40, size=6, filename=path)["error"]["desc"]


def test_a_flood_without_an_end_is_refused(ours):
    ours.negotiate()
    ours.send(b'"' + b"x" * (2 << 20) + b'"')
    assert "size limit" in ours.reply()["error"]["desc"]


def test_qemus_own_client_drives_it(server, backend):
    async def drive():
        client = QMPClient("test")
        await client.connect(server.address.removeprefix("unix:"))
        status = await client.execute("query-status")
        with client.listener("STOP") as stops:
            await client.execute("stop")
            event = await stops.get()
        commands = await client.execute("query-commands")
        out_of_band = await client.execute("query-migrate")
        await client.disconnect()
        return status, event["event"], commands, out_of_band

    status, event, commands, info = asyncio.run(asyncio.wait_for(drive(), DEADLINE_SECONDS))
    assert (status["status"], event, info) == ("running", "STOP", {})
    assert {"name": "migrate-recover"} in commands


@pytest.fixture
def event_loop():
    """For a client that would make one and never close it, to the harm of some later test."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.usefixtures("event_loop")
def test_qmp_shell_drives_it(server, capsys):
    with QMPShell(server.address.removeprefix("unix:")) as shell:
        shell.connect(negotiate=True)
        assert shell.cmd_raw("query-status")["return"]["status"] == "running"
        assert shell.show_banner("hello") is None
        assert "running" in str(shell.cmd("query-status"))


def test_tcp(backend):
    server = serve_qmp("tcp:127.0.0.1:0,server=on,wait=off", backend)
    host, _, port = server.address.removeprefix("tcp:").rpartition(":")
    with socket.create_connection((host, int(port)), DEADLINE_SECONDS) as client:
        assert b'"QMP"' in client.makefile("rb").readline()
    server.close()


def test_addresses_that_cannot_be_served(server, backend, tmp_path):
    with pytest.raises(CannotListen, match="in use"):
        serve_qmp(server.address, backend)
    with pytest.raises(Refused, match="unix:PATH"):
        serve_qmp("pipe:x", backend)
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(tmp_path / "old"))
    serve_qmp(f"unix:{tmp_path}/old", backend).close()
    assert not (tmp_path / "old").exists()


def console(backend, text):
    out = io.StringIO()
    HmpConsole(backend, io.StringIO(text), out).run()
    return out.getvalue().partition("\n")[2]


def test_console_ends_at_eof_and_quit(backend):
    assert console(backend, "info status\n") == "(postcopy) VM status: running\n(postcopy) "
    assert console(backend, "quit\ninfo status\n") == "(postcopy) "
    assert backend.machine.has_quit.is_set()


def test_console_waits_for_the_end_of_a_migration():
    backend = make_backend()
    asked = threading.Event()
    states = iter([Status.SETUP, Status.ACTIVE, Status.FAILED])

    def info():
        asked.set()
        return MigrationInfo(next(states), error_desc="nobody there")

    backend.migration.info = info
    assert console(backend, "migrate tcp:a:1\n").startswith("(postcopy) Error: nobody there\n")
    assert next(states, None) is None


def test_hmp_over_a_socket(backend, tmp_path):
    server = serve_hmp(f"unix:{tmp_path}/hmp", backend)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_SECONDS)
        client.connect(str(tmp_path / "hmp"))
        client.sendall(b"info status\r\nquit\r\n")
        said = client.makefile("rb").read()
    assert b"(postcopy) VM status: running\r\n" in said
    server.close()


def test_query_status_says_whose_the_guest_is(ours, backend):
    ours.negotiate()
    assert ours.execute("query-status") == {"return": {"status": "running", "running": True}}
    assert ours.ownership == {"x-owner": "ours"}
    backend.machine.ownership.ordered("migrate", "outgoing", "tcp:there:1")
    backend.machine.ownership.move(Move.ORDER)
    ours.execute("query-status")
    order = {"name": "migrate", "direction": "outgoing", "uri": "tcp:there:1"}
    assert ours.ownership == {"x-owner": "moving", "x-last-order": order}
