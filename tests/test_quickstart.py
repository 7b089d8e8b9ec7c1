"""The newcomer's one command, as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.full
def test_quickstart_keeps_its_promises():
    subprocess.run([sys.executable, "examples/quickstart.py"], cwd=ROOT, check=True)
    samples = json.loads((ROOT / "quickstart" / "samples.json").read_text())
    assert [sample["language"] for sample in samples] == ["en", "code", "fi", "hi", "ja", "vi"]
    assert all(sample["after"].strip() for sample in samples)
    assert (ROOT / "quickstart" / "report.html").stat().st_size > 50_000
