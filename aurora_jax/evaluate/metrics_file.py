"""Reading a run's metrics.jsonl (which `aurora_jax/train/metrics.py` writes)."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from aurora_jax.errors import InputError
from aurora_jax.storage import line_log
from aurora_jax.storage.places import Place


@dataclass
class _Row:
    step: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
    stage: str


@dataclass
class _Step(_Row):
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: float
    skipped: float
    tokens_per_second: float
    task_loss: dict[str, float]


@dataclass
class _Score:
    bits_per_byte: float


@dataclass
class _Evaluation(_Row):
    complete: bool
    evaluation: dict[str, _Score]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Sample:
    language: str
    prompt: str
    continuation: str


@dataclass
class _Samples(_Row):
    samples: list[_Sample]


@dataclass
class _Account(_Row):
    goodput: float
    seconds: dict[str, float]


KINDS: dict[str, type[_Row]] = {
    "loss": _Step,
    "evaluation": _Evaluation,
    "complete": _Evaluation,
    "samples": _Samples,
    "goodput": _Account,
    "left_out": _Row,
}
"""What a row has at least, by the key that tells its kind. It may have more."""


def read_metrics(path: Place) -> list[dict]:
    """Rows of a metrics.jsonl; a last line that a dying process left unfinished is ignored.

    Raises:
        InputError: there is no such file, a line before the last is not a JSON object, or a row is none of a run's:
            its number and what is wrong are named.
    """
    if not line_log.is_there(path):
        raise InputError(f"{path}: no such file; give the folder of a training run (its --output).")
    rows = line_log.read_log(path)
    for number, row in enumerate(rows, start=1):
        kind = next((kind for key, kind in KINDS.items() if key in row), _Row)
        try:
            msgspec.convert(row, kind)
        except (msgspec.ValidationError, UnicodeError) as error:
            raise InputError(f"{path}, row {number} is none of a run: {error}.") from None
    return rows
