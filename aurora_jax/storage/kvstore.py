"""Folders as TensorStore's key-value stores: local ones, and those of object stores."""

from functools import cache
from pathlib import Path
from typing import Any

import tensorstore as ts

from aurora_jax.errors import InputError

CACHE_BYTES = 32 << 20


@cache
def context() -> ts.Context:
    """One cache of CACHE_BYTES, of shards' indices and decoded chunks, and one `memory://` for the process."""
    return ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def kvstore_at(directory: str | Path) -> ts.KvStore:
    """The files of a folder: a local path, or a URL. Raises InputError if TensorStore does not know such a place."""
    directory = str(directory).rstrip("/")
    spec: Any = f"{directory}/" if "://" in directory else {"driver": "file", "path": f"{Path(directory).absolute()}/"}
    try:
        return ts.KvStore.open(spec, context=context()).result()
    except ValueError as error:
        raise InputError(f"{directory}: not a place that TensorStore can open: {error}") from error
