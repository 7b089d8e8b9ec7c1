"""Continual pretraining of StarCoder-family models on TPU: PyTorch weights in, Flax on a mesh, PyTorch weights out.

`import aurora_jax as aurora` has the names of FACE and `sample_corpus`; JAX is imported at the first use.
"""

import os
from typing import Any

# Buckets are read through gcsfs: TensorFlow's file system takes seconds to import, and is asked by whoever uses etils
# first, Orbax too, once for the process.
os.environ.setdefault("EPATH_USE_TF", "false")
# It would ask for the kind of bucket at every call, where it may not know it.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

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
