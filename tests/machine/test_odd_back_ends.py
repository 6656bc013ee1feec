"""Back ends that answer what cannot be, or not at all: refused by name, and the guest runs on."""

import contextlib
import gc
import os
import socket
import struct
import tempfile
import threading
from pathlib import Path
from random import Random

import pytest

from fakes.odd_back_end import CLOSE, PROTOCOL, SILENT, Answer, OddBackEnd, config, number
from fakes.vhost_front_end import (
    FLUSH,
    GET_CONFIG,
    GET_FEATURES,
    GET_PROTOCOL_FEATURES,
    GET_VRING_BASE,
    POSTCOPY_ADVISE,
    POSTCOPY_END,
    POSTCOPY_LISTEN,
    PROTOCOL_FEATURES,
    SET_FEATURES,
    SET_LOG_BASE,
    SET_MEM_TABLE,
    SET_OWNER,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    SET_VRING_KICK,
    SET_VRING_NUM,
    VERSION_1,
)
from fakes.waiting import wait_until
from machine.drives import disk_workload
from machine.machines import MIB, config_for, need
from machine.test_vhost_user_disk import Driver
from postcopy.errors import GuestError, KernelError, Refused, VhostUserError
from postcopy.kernel import processes
from postcopy.machine import back_ends
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine
from postcopy.vhost_user import back_end_process
from postcopy.vhost_user.front_end import FrontEnd, MemoryPart

MESSAGES = int(os.environ.get("POSTCOPY_MESSAGES", "25000"))


@pytest.fixture
def odd():
    """``odd(answers)``: a back end."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())  # a socket's path must be short
        yield lambda answers=(): stack.enter_context(OddBackEnd(f"{folder}/sock", answers))


def named(value):
    """For the name of a test."""
    return value if isinstance(value, str) else f"{value}" if isinstance(value, int) else ""


def machine_with(back_end):
    return Machine(MachineConfig(32 * MIB, accel="unicorn", vhost_user_blk=str(back_end.path)))


NETWORK = number(PROTOCOL | 1 << 2)


@pytest.mark.parametrize(
    ("kind", "answers", "why"),
    [
        (
            "net",
            {},
            "is no network device: it offers what a disk does .*; give it by --vhost-user-blk",
        ),
        ("blk", {GET_PROTOCOL_FEATURES: NETWORK}, "is no disk: .*; give it by --vhost-user-net"),
    ],
)
def test_a_back_end_of_the_other_kind_is_refused_by_name(odd, kind, answers, why):
    back_end = odd(answers)
    with pytest.raises(Refused, match=f"vhost-user back end {back_end.path} .* {why}"):
        Machine(MachineConfig(32 * MIB, accel="unicorn", **{f"vhost_user_{kind}": back_end.path}))


ANY = [
    (CLOSE, "closed"),
    (Answer(flags=1), "an answer is due"),
    (Answer(flags=7), "flags 0x7"),
    (Answer(b"", size=1 << 31), "2147483648 bytes of payload, and at most"),
    (Answer(b"", size=4, end=True), " of its payload of 4"),
    (Answer(fds=2), "2 descriptors, and it has"),
    (Answer(request=99), "message 99 is not taken here"),
    (Answer(request=GET_VRING_BASE), "GET_VRING_BASE: "),
]
FIRST = [(request, *each) for request in (GET_FEATURES, GET_CONFIG) for each in ANY] + [
    (GET_FEATURES, number(VERSION_1), "GET_FEATURES: 0x40000000 are required, and not offered"),
    (GET_FEATURES, number(PROTOCOL_FEATURES), "0x100000000 are required, and not offered"),
    (GET_PROTOCOL_FEATURES, number(8), "CONFIG is required, and not offered"),
    (SET_OWNER, number(1), "SET_OWNER: it has failed (0x1)"),
    (GET_CONFIG, config(size=8), "8 bytes of configuration from 0 on, and 57 from 0 on were"),
    (GET_CONFIG, config(offset=1), "57 bytes of configuration from 1 on, and 57 from 0"),
    (GET_CONFIG, b"", "0 bytes of payload"),
]


@pytest.mark.parametrize(("request_", "answer", "why"), FIRST, ids=named)
def test_no_machine_begins_with_it(odd, request_, answer, why):
    back_end = odd({request_: answer})
    with pytest.raises(Refused) as refusal:
        machine_with(back_end)
    assert str(refusal.value).startswith(f"vhost-user back end {back_end.path}")
    assert why in str(refusal.value)


def test_one_that_does_not_answer(odd, monkeypatch):
    monkeypatch.setattr(back_ends, "ANSWER_S", 0.2)
    with pytest.raises(Refused, match="it does not answer; it may have another front end"):
        machine_with(odd({GET_FEATURES: SILENT}))


STARTED = (
    SET_FEATURES,
    SET_MEM_TABLE,
    SET_VRING_NUM,
    SET_VRING_BASE,
    SET_VRING_ADDR,
    SET_VRING_CALL,
    SET_VRING_KICK,
    SET_VRING_ENABLE,
)


@pytest.mark.parametrize(
    "answer", [CLOSE, number(1), Answer(b"", size=1 << 31), Answer(fds=1)], ids=named
)
@pytest.mark.parametrize("request_", STARTED)
def test_the_ring_is_started_with_the_next_connection(odd, caplog, request_, answer):
    back_end = odd({request_: answer})
    with machine_with(back_end) as machine:
        driver = Driver(machine)
        driver.begin()
        machine._drive.runner.want()
        wait_until(lambda: back_end.heard.count(SET_VRING_ENABLE) == 1 + (request_ == 18), 10)
        assert "the guest runs on, and its requests wait for a back end" in caplog.text


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (CLOSE, "closed"),
        (struct.pack("=II", 1, 0), "GET_VRING_BASE: ring 1 at 0x0, and ring 0 was asked for"),
        (struct.pack("=II", 0, 1 << 16), "ring 0 at 0x10000"),
        (
            struct.pack("=II", 0, 7),
            "it says that requests [7] are next, one a ring, and has done all before [0]",
        ),
    ],
    ids=named,
)
def test_the_ring_stops_where_the_used_ring_says(odd, caplog, answer, why):
    back_end = odd({GET_VRING_BASE: answer})
    with machine_with(back_end) as machine:
        driver = Driver(machine)
        driver.begin()
        runner = machine._drive.runner
        runner.want()
        wait_until(lambda: SET_VRING_ENABLE in back_end.heard, 10)
        wait_until(lambda: runner._served, 10)
        runner.unwant()
        assert runner.wait_parked(10)
        assert why in caplog.text
        assert machine.save_devices()


@pytest.mark.parametrize("done", [0, 2], ids=["in order", "out of order"])
def test_the_used_index_says_what_is_done_again(odd, done):
    """It may have ended after the connection.  Out of order the first is never done: docs/drive.md."""
    back_end = odd()
    with machine_with(back_end) as machine:
        driver = Driver(machine)
        driver.begin()
        machine._drive.runner.want()
        wait_until(lambda: SET_VRING_ENABLE in back_end.heard, 10)
        for _ in range(3):
            driver.requests.submit(FLUSH, kick=False)
        back_end.gate.clear()
        back_end.disconnect()
        wait_until(lambda: not machine.shared_with(), 10)
        available, used = driver.ring.available + 4, driver.ring.used + 4
        driver.bytes[used : used + 2] = driver.bytes[
            available + 2 * done : available + 2 * done + 2
        ]
        driver.bytes[driver.ring.used + 2] = 1
        back_end.gate.set()
        wait_until(lambda: back_end.heard.count(SET_VRING_ENABLE) == 2, 10)
        assert back_end.payloads[SET_VRING_BASE] == struct.pack("=II", 0, 1)


MISSING = [
    (POSTCOPY_ADVISE, CLOSE, "closed"),
    (POSTCOPY_ADVISE, Answer(b"12345678"), "8 bytes of payload, and at most 0"),
    (POSTCOPY_ADVISE, Answer(fds=2), "2 descriptors, and it has 1"),
    (POSTCOPY_ADVISE, Answer(b""), "0 descriptors, and it has 1"),
    (POSTCOPY_LISTEN, number(1), "POSTCOPY_LISTEN: it has failed"),
    (SET_MEM_TABLE, CLOSE, "closed"),
    (SET_MEM_TABLE, number(0), "0 regions, and 1 to 8 are possible"),
    (SET_MEM_TABLE, struct.pack("=II4Q", 1, 0, 0, 4096, 0, 0), "the answer has other regions than"),
    (GET_PROTOCOL_FEATURES, number(0x20A), "it does not offer PAGEFAULT"),
]


@pytest.mark.parametrize(("request_", "answer", "why"), MISSING, ids=named)
def test_it_is_not_served_missing_pages(odd, request_, answer, why):
    back_end = odd({request_: answer})
    with machine_with(back_end) as machine:
        before = len(list(Path("/proc/self/fd").iterdir()))
        (process,) = machine.shared_with()
        with pytest.raises(GuestError) as refusal:
            process.watch_missing()
        assert str(refusal.value).startswith(f"vhost-user back end {back_end.path}")
        assert why in str(refusal.value)
        assert process in machine.shared_with() or process.failure
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def waits_of(thread):
    """How often a thread has waited, and whether it waits in ``poll`` now."""
    task = Path(f"/proc/self/task/{thread.native_id}")
    status = dict(line.split(":\t") for line in (task / "status").read_text().splitlines())
    return int(status["voluntary_ctxt_switches"]), "poll" in (task / "wchan").read_text()


def test_its_device_goes_on_while_it_is_connected_anew(odd):
    """The memory that it has mapped can be registered for missing pages by another connection only."""
    back_end = odd()
    with machine_with(back_end) as machine:
        (process,) = machine.shared_with()
        os.close(process.watch_missing().userfaultfd)
        process.unwatch_missing()
        (thread,) = [each for each in threading.enumerate() if each.name == "vhost-user"]
        back_end.gate.clear()
        before, _ = waits_of(thread)
        anew = threading.Thread(
            target=lambda: os.close(process.watch_missing().userfaultfd), daemon=True
        )
        anew.start()
        wait_until(lambda: back_end.heard.count(GET_FEATURES) > 1, 10, "it is connected anew")
        process.release()  # its device looks what is to be done

        def has_looked():
            assert thread.is_alive(), machine.failure
            count, waits = waits_of(thread)
            return count > before and waits

        wait_until(has_looked, 10, "the device has looked")
        back_end.gate.set()
        anew.join(10)
        assert machine.failure is None
        assert process.failure is None
        process.unwatch_missing()


def test_one_that_has_not_mapped_the_memory_is_not_served_missing_pages(odd, monkeypatch):
    monkeypatch.setattr(processes, "mapped_parts", lambda *_: [])
    with machine_with(odd()) as machine:
        (process,) = machine.shared_with()
        with pytest.raises(GuestError, match=r"has not mapped all of 'microvm\.ram'"):
            process.watch_missing()


def test_one_whose_mappings_cannot_be_seen_is_asked_for_nothing(odd, monkeypatch):
    def refuse(*_):
        raise KernelError("open", 13, "/proc/1/maps")

    monkeypatch.setattr(processes, "mapped_parts", refuse)
    back_end = odd()
    with machine_with(back_end) as machine:
        (process,) = machine.shared_with()
        with pytest.raises(GuestError, match=r"cannot be seen .*; run both as the same user"):
            process.watch_missing()
        assert POSTCOPY_ADVISE not in back_end.heard


@pytest.mark.parametrize("answer", [CLOSE, number(1), Answer(flags=1)], ids=named)
def test_the_end_of_a_postcopy_that_it_does_not_answer(odd, answer):
    with machine_with(odd({POSTCOPY_END: answer})) as machine:
        (process,) = machine.shared_with()
        with pytest.raises(GuestError, match=r"POSTCOPY_END|closed"):
            process.unwatch_missing()


@pytest.mark.parametrize("answer", [CLOSE, Answer(b"1234"), SILENT], ids=named)
def test_a_log_that_it_does_not_take(odd, monkeypatch, answer):
    monkeypatch.setattr(back_end_process, "ANSWER_S", 0.3)
    with machine_with(odd({SET_LOG_BASE: answer})) as machine:
        (process,) = machine.shared_with()
        log = os.memfd_create("log")
        with pytest.raises(GuestError, match="vhost-user back end"):
            process.log_writes(log, 4096)
        os.close(log)


def test_a_log_whose_answer_is_empty(odd):
    """DPDK's."""
    with machine_with(odd({SET_LOG_BASE: Answer(b"")})) as machine:
        (process,) = machine.shared_with()
        log = os.memfd_create("log")
        process.log_writes(log, 4096)
        os.close(log)


def test_a_guest_with_it_runs_on_while_it_closes_each_connection(odd, caplog):
    need("kvm")
    workload = disk_workload()
    back_end = odd()
    made = config_for(workload, "kvm", vhost_user_blk=str(back_end.path))
    with Machine(made) as machine:
        back_end.answers = {SET_VRING_KICK: CLOSE}
        back_end.once = False
        machine.start()
        wait_until(lambda: back_end.heard.count(SET_VRING_KICK) > 2, 20, "it is tried again")
        assert machine.running
        machine.pause()
        machine.resume()
        assert machine.running
        told = len([each for each in caplog.messages if "requests wait for" in each])
        assert told <= back_end.heard.count(SET_VRING_KICK)  # once a try, and they become fewer


def answer_with_log(answers, log):
    """A front end's messages, answered with these bytes and descriptors."""
    ours, theirs = socket.socketpair()
    with theirs:
        for data, fds in answers:
            socket.send_fds(theirs, [data], fds)
        theirs.shutdown(socket.SHUT_WR)
        front_end = FrontEnd(ours)
        front_end.connection.bound(5)
        with contextlib.closing(front_end):
            front_end._negotiate()
            front_end.configuration(57)
            os.close(front_end.advise())
            front_end.listen([MemoryPart("ram", 0, 1 << 20, 0, log, 0)])
            front_end.set_log(log, 4096)
            front_end.stop_ring(0)
            front_end.end()


def right(part):
    """The right answers of a back end to these."""
    table = struct.pack("=II4Q", 1, 0, 0, 1 << 20, 0, 0)
    answers = (
        (GET_FEATURES, number(VERSION_1 | PROTOCOL_FEATURES)),
        (GET_PROTOCOL_FEATURES, number(0x30A)),
        (SET_OWNER, number(0)),
        (GET_CONFIG, config()),
        (POSTCOPY_ADVISE, b""),
        (POSTCOPY_LISTEN, number(0)),
        (SET_MEM_TABLE, table),
        (GET_FEATURES, number(0)),
        (SET_LOG_BASE, number(0)),
        (GET_VRING_BASE, number(0)),
        (POSTCOPY_END, number(0)),
    )
    return [
        [bytearray(struct.pack("=III", request, 5, len(data)) + data), request == POSTCOPY_ADVISE]
        for request, data in answers
    ][: part or None]


@pytest.mark.parametrize("seed", range(4))
def test_no_answer_does_anything_but_be_taken_or_refused(seed):
    random = Random(seed)
    log = os.memfd_create("log")
    gc.collect()  # descriptors of earlier tests
    before, refused = len(list(Path("/proc/self/fd").iterdir())), set()
    for _ in range(MESSAGES // 10):
        answers = right(random.choice([0, 0, 0, 3, 7]))
        for _ in range(random.randrange(3)):
            answer = random.choice(answers)
            at = random.randrange(len(answer[0]))
            change = random.choice([0, 1, 2, 255, answer[0][at] ^ 1 << random.randrange(8)])
            answer[0][at] = change
        if not random.randrange(4):
            answer = random.choice(answers)
            answer[1] = not answer[1]
        if not random.randrange(4):
            del random.choice(answers)[0][random.randrange(8) :]
        fds = [[log] if has_descriptor else [] for _, has_descriptor in answers]
        sent = [(bytes(data), each) for (data, _), each in zip(answers, fds, strict=True)]
        try:
            answer_with_log(sent, log)
        except (VhostUserError, OSError) as error:
            refused.add(str(error).partition(":")[0])
    assert len(refused) > 8, refused
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    os.close(log)
