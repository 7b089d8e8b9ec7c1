"""Continual pretraining of StarCoder-family models on TPU: PyTorch weights in, Flax on a mesh, PyTorch weights out.

`import aurora_jax as aurora` has the names of FACE and `sample_corpus`; JAX is imported at the first use.
"""

from typing import Any

FACE = ("Model", "TrainingRun", "load")


def __getattr__(name: str) -> Any:
    if name not in (*FACE, "sample_corpus"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from aurora_jax import environment

    environment.prepare()
    if name == "sample_corpus":  # the room of that name, which can be called
        return importlib.import_module("aurora_jax.sample_corpus")
    return getattr(importlib.import_module("aurora_jax.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *FACE, "sample_corpus"})
