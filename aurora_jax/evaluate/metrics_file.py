"""Reading a run's metrics.jsonl (which `aurora_jax/train/metrics.py` writes)."""

from pathlib import Path

from aurora_jax.errors import InputError
from aurora_jax.storage import json_lines


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl; a last line that a dying process left unfinished is ignored.

    Raises:
        InputError: there is no such file, or a line before the last is not a JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the folder of a training run (its --output).")
    return json_lines.read_log(path)
