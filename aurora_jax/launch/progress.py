"""How far a run has come, read from its files: the newest complete checkpoint, and the code that wrote it.

`aurora_jax/checkpoints/format.py` and `aurora_jax/train/checkpoint.py` say the same with libraries that only
the run's own environment has; a test compares.
"""

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ITEMS = ("params", "metadata", "_CHECKPOINT_METADATA")
"""What a complete checkpoint has."""
LONGEST_LOOK = 300.0
"""Seconds for a look into a bucket."""
FACTS = "run/metadata"
"""JSON, within a checkpoint: the facts of its run, `revision` among them."""


@dataclass(frozen=True)
class Newest:
    """The newest complete checkpoint of a run's folder.

    Attributes:
        step: None if there is none yet.
        revision: the commit whose code wrote it; None if it does not say.
    """

    step: int | None
    revision: str | None = None

    def __str__(self) -> str:
        code = f" (code {self.revision[:12]})" if self.revision else ""
        return f"checkpoint {'none' if self.step is None else self.step}{code}"


def output_of(command: Sequence[str]) -> str | None:
    """The folder after --output in a command of `aurora train`, the last one as there; None where the config
    alone says it."""
    found = None
    for number, word in enumerate(command):
        if word == "--output":
            found = "".join(command[number + 1 : number + 2])
        elif word.startswith("--output="):
            found = word.removeprefix("--output=")
    return found or None


def newest_of(command: Sequence[str]) -> Newest | None:
    """The newest checkpoint of the run that a command, its interpreter first, trains."""
    return newest_checkpoint(output_of(command), command[0] if command else None)


def newest_checkpoint(output: str | None, python: str | None = None) -> Newest | None:
    """The newest checkpoint in OUTPUT/checkpoints; None if that cannot be known: no folder was named, or it
    cannot be read.

    Args:
        python: the run's interpreter, which has the libraries that read buckets.
    """
    if output is None:
        return None
    if output.startswith("gs://"):
        return _newest_in_bucket(output, python) if python else None
    folder = Path(output) / "checkpoints"
    try:
        if not folder.is_dir():
            return Newest(None)
        steps = [entry for entry in folder.iterdir() if re.fullmatch("[0-9]+", entry.name)]
        complete = [step for step in steps if all((step / item).exists() for item in ITEMS)]
        if not complete:
            return Newest(None)
        newest = max(complete, key=lambda step: int(step.name))
        facts = newest / FACTS
        revision = json.loads(facts.read_text()).get("revision") if facts.is_file() else None
    except (OSError, ValueError):
        return None
    return Newest(int(newest.name), revision)


def _newest_in_bucket(output: str, python: str) -> Newest | None:
    command = [python, "-m", "aurora_jax", "checkpoints", "newest", output]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_LOOK, check=True).stdout
        found = json.loads(said)
        return Newest(found["step"], found["revision"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return None


def revision_at(code: Path) -> str | None:
    """The commit of the code in a folder, as `setup` writes it down there."""
    return (code / "COMMIT").read_text().strip() if (code / "COMMIT").is_file() else None
