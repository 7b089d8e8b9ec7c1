"""The compiler's memory estimate against the memory that a process really took, where one is at hand: on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("cpu_memory.py")


def memory(rematerialisation: str) -> dict[str, int]:
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    command = [sys.executable, WORKER, rematerialisation]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_estimated_memory_is_what_a_step_takes():
    """What rematerialisation saves is 1.3 GB by both accounts; a step takes some 0.1 GB more, scratch that
    XLA does not count."""
    nothing, full = memory("nothing"), memory("full")
    assert nothing["estimated"] - full["estimated"] > 1e9
    assert nothing["measured"] - full["measured"] == pytest.approx(nothing["estimated"] - full["estimated"], rel=0.1)
    for found in (nothing, full):
        assert 0.95 * found["estimated"] < found["measured"] < found["estimated"] + 0.2e9
