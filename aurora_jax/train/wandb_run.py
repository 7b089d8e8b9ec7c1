"""Weights & Biases, for those who ask for it with --wandb-project. It is imported nowhere else, and no requirement."""

import importlib
import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from types import ModuleType
from typing import Any

from aurora_jax.errors import InputError
from aurora_jax.storage.atomic import write_file
from aurora_jax.storage.places import is_remote
from aurora_jax.storage.records import object_in
from aurora_jax.train.config import TrainConfig


def import_wandb() -> ModuleType:
    """The package. Raises InputError, with the command that installs it, if it is not there."""
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise InputError(
            f"--wandb-project needs Weights & Biases: pip install wandb (and `wandb login` once). {error}."
        ) from error


class WandbRun:
    """One run at Weights & Biases for one run of ours: OUTPUT/wandb.json keeps its id, so that a resumed run
    goes on with its curves."""

    def __init__(self, config: TrainConfig, project: str):
        wandb = import_wandb()
        kept = config.output / "wandb.json"
        identity = object_in(kept.read_bytes(), kept)["id"] if kept.is_file() else secrets.token_hex(8)
        write_file(kept, json.dumps({"project": project, "id": identity}) + "\n")
        self._run = wandb.init(
            project=project,
            name=config.output.name,
            id=identity,
            resume="allow",
            dir=tempfile.mkdtemp(prefix="aurora-wandb-") if is_remote(config.output) else str(config.output),
            config=_plain(asdict(config)),
        )

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Scalars under the names that TensorBoard has."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def _plain(value: Any) -> Any:
    """Paths as text, the rest as it is."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, os.PathLike) else value
