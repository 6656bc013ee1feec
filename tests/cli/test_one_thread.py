"""A command starts no thread that it does not use, and leaves its children's environment alone."""

import os
import subprocess
import sys

import pytest

CODE = """
import os
from postcopy.cli.process import import_numpy
before = dict(os.environ)
import_numpy()
import numpy
assert os.environ == before, os.environ
print(len(os.listdir("/proc/self/task")), numpy.zeros(3) @ numpy.ones(3))
"""
BLAS = "OPENBLAS_NUM_THREADS"


@pytest.mark.parametrize("own", [{}, {BLAS: "1"}])
def test_numpy_comes_without_threads(own):
    environment = {name: value for name, value in os.environ.items() if name != BLAS} | own
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout == "1 0.0\n"


def test_each_public_name_of_the_client_is_found_when_it_is_asked_for():
    code = """
import sys, postcopy.client as client
assert not [name for name in sys.modules if name.startswith("postcopy.client.")]
for name in client.__all__:
    assert getattr(client, name) is not None
assert set(client.__all__) <= set(dir(client))
try:
    client.nothing
except AttributeError as error:
    print(error)
from postcopy.client import *
assert Machine is client.Machine
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "module 'postcopy.client' has no attribute 'nothing'\n"
