"""The step on a mesh equals the step on one device, over every axis; each run in a process that has eight CPU
devices."""

from pathlib import Path

import pytest
from eight_devices import run_on_eight_devices

WORKER = Path(__file__).with_name("divided_step.py")


@pytest.mark.parametrize(
    ("attention", "which", "comparisons"),
    [
        ("xla", "quick", 14),
        ("flash_interpreted", "quick", 6),
        pytest.param("xla", "all", 590, marks=pytest.mark.full),
        pytest.param("flash_interpreted", "all", 590, marks=pytest.mark.full),
    ],
)
def test_loss_and_gradients_on_every_mesh_are_those_of_one_device(attention, which, comparisons):
    done = run_on_eight_devices(WORKER, attention, which)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(": equal") == comparisons
