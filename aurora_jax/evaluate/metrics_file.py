"""Reading a run's metrics.jsonl (which `aurora_jax/train/metrics.py` writes)."""

import json
from pathlib import Path

from aurora_jax.errors import InputError


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl; a last line that a dying process left unfinished is ignored.

    Raises:
        InputError: there is no such file, or a line before the last is not JSON.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the folder of a training run (its --output).")
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: not JSON ({error}); the file is damaged.") from error
    return rows
