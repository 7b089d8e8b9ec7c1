"""One step over several processes (`jax.distributed`, gloo) gives the losses and gradients of one device, the
batch being the same."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("several_processes.py")


# Four divide every axis between them; two are the same with less of it, and take half the time.
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.full)])
def test_processes_together_equal_one_device(processes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # each program runs once
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, str(port), str(processes), str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    results = [(*worker.communicate(), worker.returncode) for worker in workers]
    for _, errors, status in results:
        assert status == 0, errors[-3000:]
    assert results[0][0].count(": equal") == 2
