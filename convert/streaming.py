"""Arrays that are larger than memory, moved block by block: several blocks in flight, each in buffers that
are used again and again.

Orbax keeps its part: the tree's metadata. Only the data of the arrays is ours.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

WORKERS = min(8, 1 + (os.cpu_count() or 1))
"""Blocks in flight: as many as there are processors, and one more that waits for the disk."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class UnwrittenArray:
    """An array of a checkpoint without its data: every chunk is missing until it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    """Shape of the stored chunks. What is written should consist of whole chunks: a chunk in two blocks would
    be read back and rewritten."""


class _UnwrittenArrayHandler(ocp.type_handlers.NumpyHandler):
    """Creates zarr arrays.

    It keeps the type name of NumPy arrays, which carry no sharding: such a leaf restores on any mesh when a
    target is given, and as a NumPy array without one.
    """

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list[ocp.future.Future]:
        del args
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            metadata = {"shape": value.shape, "chunks": value.chunk_shape, "compressor": None}
            await ts.open({**_zarr_spec(info.path), "dtype": value.dtype.name, "metadata": metadata}, create=True)
        return []


def unwritten_handler() -> ocp.PyTreeCheckpointHandler:
    """The Orbax handler for a tree of UnwrittenArrays. A chunk is a file: a key-value database would buffer
    gigabytes."""
    registry = ocp.type_handlers.create_type_handler_registry((UnwrittenArray, _UnwrittenArrayHandler()))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)


def open_for_writing(folder: Path) -> ts.TensorStore:
    """An array that `unwritten_handler` created. Nothing is cached; a write returns when its data is on the disk."""
    return ts.open(
        _zarr_spec(folder), write=True, context=ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    ).result()


def _zarr_spec(path: Any) -> dict[str, Any]:
    return {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "store_data_equal_to_fill_value": True,  # a missing chunk is damage, not zeros
    }


class Scratch(threading.local):
    """Buffers of each thread: memory that is allocated anew for every block costs more time than the block."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def array(self, role: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with whatever its thread left in the buffer of that role."""
        count = int(np.prod(shape)) * dtype.itemsize
        if role not in self._buffers or self._buffers[role].nbytes < count:
            self._buffers[role] = np.empty(count, np.uint8)
        return self._buffers[role][:count].view(dtype).reshape(shape)


def row_major(values: np.ndarray) -> np.ndarray:
    """The same values in row-major order. JAX's runtime transposes more than twice as fast as NumPy."""
    return np.asarray(jax.device_put(values, jax.local_devices(backend="cpu")[0]))


def for_each(items: Iterable[Item], work: Callable[[Item], None]) -> None:
    """Calls `work` for every item, WORKERS at a time. The first error stops it, when what is in flight has ended."""
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for item in items:
                if len(pending) == 2 * WORKERS:
                    pending.popleft().result()
                pending.append(pool.submit(work, item))
            while pending:
                pending.popleft().result()
        except BaseException:
            for future in pending:
                future.cancel()
            raise
