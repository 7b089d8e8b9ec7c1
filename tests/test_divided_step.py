"""The step on a mesh equals the step on one device, over every axis; each run in a process that has eight CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("divided_step.py")


@pytest.mark.parametrize(
    ("attention", "which", "comparisons"),
    [
        ("xla", "quick", 14),
        ("flash_interpreted", "quick", 14),
        pytest.param("xla", "all", 310, marks=pytest.mark.full),
        pytest.param("flash_interpreted", "all", 310, marks=pytest.mark.full),
    ],
)
def test_loss_and_gradients_on_every_mesh_are_those_of_one_device(attention, which, comparisons):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, WORKER, attention, which], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(": equal") == comparisons
