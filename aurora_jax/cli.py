"""The command line: `aurora` or `python -m aurora_jax`."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from aurora_jax.errors import InputError


def load_config(path: Path) -> Any:
    """The value of `config()` in a Python file. Raises InputError if there is no such file or function."""
    if not path.is_file():
        raise InputError(f"{path}: no such config file; there are {', '.join(sorted(str(p) for p in Path('configs').glob('[!_]*.py')))}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise InputError(f"{path}: a config file must have a function `config()` that returns a TrainConfig.")
    return module.config()


def _train(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        print(
            "usage: aurora train CONFIG.py [--field value ...]\n\nTrains what a config file describes; `aurora train CONFIG.py --help` lists every field."
        )
        if arguments and arguments[0] in ("-h", "--help"):
            return
        raise InputError("aurora train needs a config file, such as configs/nano_cap.py.")
    from aurora_jax.train.config import TrainConfig
    from aurora_jax.train.loop import train

    config = tyro.cli(TrainConfig, default=load_config(Path(arguments[0])), args=list(arguments[1:]), prog=f"aurora train {arguments[0]}")
    train(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2 for input that the user can mend)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _train(arguments[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
