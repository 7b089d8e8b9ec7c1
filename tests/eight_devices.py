"""Programs that need a mesh: a process of its own with eight CPU devices. The tests' process has one, and JAX
counts them once."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_on_eight_devices(program: Path | str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a Python file, or a text of Python, from the project's root; returns its status and what it printed."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # such programs run once: most of their time is their compilation
    }
    command = [sys.executable, *([program] if isinstance(program, Path) else ["-c", program]), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
