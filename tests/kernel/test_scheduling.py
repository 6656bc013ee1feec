"""Threads for which a vCPU waits ask for short turns."""

import threading

import pytest

from postcopy.errors import KernelError
from postcopy.kernel import calls
from postcopy.kernel.threads import run_soon, slice_ns


def test_only_the_thread_that_asks_gets_shorter_turns():
    before = slice_ns()
    if not before:
        pytest.skip("needs slices that can be asked for: Linux 6.12 or newer")
    found = []

    def ask():
        run_soon()
        found.append(slice_ns())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(10)
    assert found == [100_000]
    assert slice_ns() == before


def test_a_kernel_that_does_not_know_it_is_no_error(monkeypatch):
    def refuse(name, *_):
        raise KernelError(name, 22)

    monkeypatch.setattr(calls, "syscall", refuse)
    run_soon()
