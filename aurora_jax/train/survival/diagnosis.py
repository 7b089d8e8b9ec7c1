"""What is written down of a run that has diverged: OUTPUT/diagnosis.json.

first, last steps whose updates were skipped in a row
steps       of these, those of the last start, each with its loss, gradient norm and learning rate, and its
            batch: task, epoch, turn and first token of every row
statistics  the rolling means and variances that they were judged by (`guard.Statistics`)
norms       of parameters and of Adam's moments by dotted path; of stacked ones, layer by layer
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.checkpoints.checksums import paths_of
from aurora_jax.data.batches.loader import Loader
from aurora_jax.model.sharding import TABLE
from aurora_jax.storage.atomic import write_file
from aurora_jax.storage.places import Place
from aurora_jax.train.processes import is_first
from aurora_jax.train.state import TrainState

NAME = "diagnosis.json"


def places_of(loader: Loader, step: int) -> list[dict[str, Any]]:
    """Where each row of a batch comes from."""
    places = (loader.place(step, row) for row in range(loader.batch_size))
    return [{name: getattr(place, name) for name in ("task", "epoch", "turn", "start")} for place in places]


def write_diagnosis(
    output: Place, loader: Loader, steps: tuple[int, int], skipped: Sequence[dict[str, Any]], state: TrainState
) -> Place:
    """Writes the file; a collective over the processes, of which the first writes.

    Args:
        steps: the first and the last whose updates were skipped in a row.
        skipped: of those of this start, step, stage, loss, gradient_norm and learning_rate, in order.
    """
    norms = {name: np.asarray(value).tolist() for name, value in jax.device_get(_norms(state)).items()}
    values = {
        "first": steps[0],
        "last": steps[1],
        "steps": [{**each, "batch": places_of(loader, each["step"])} for each in skipped],
        "statistics": {name: float(value) for name, value in jax.device_get(state.statistics)._asdict().items()},
        "norms": norms,
    }
    path = output / NAME
    if is_first():
        write_file(path, json.dumps(values, indent=1) + "\n")
    return path


def _norms(state: TrainState) -> dict[str, jax.Array]:
    trees = {"parameters": state.parameters, "first_moment": state.moments[0].mu, "second_moment": state.moments[0].nu}
    flat = {f"{tree}.{path}": leaf for tree, leaves in trees.items() for path, leaf in paths_of(leaves).items()}

    @jax.jit
    def program(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: jnp.sqrt(_squares(name, leaf.astype(jnp.float32))) for name, leaf in leaves.items()}

    return program(flat)


def _squares(name: str, leaf: jax.Array) -> jax.Array:
    stacked = TABLE[name.partition(".")[2]].letters.startswith("N")
    return jnp.sum(leaf * leaf, axis=tuple(range(1, leaf.ndim)) if stacked else None)
