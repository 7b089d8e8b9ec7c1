"""An Orbax leaf that is written block by block: arrays larger than memory become ordinary leaves of a checkpoint.

Orbax keeps its part: the tree's metadata and the atomic commit. Only the writing of a leaf's data is ours.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

Blocks = Iterable[tuple[tuple[int | slice, ...], np.ndarray]]


@dataclass(frozen=True)
class StreamedArray:
    """An array that exists only as blocks."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    """Shape of the stored chunks. Every block should consist of whole chunks: a chunk in two blocks would be read back and rewritten."""
    blocks: Callable[[], Blocks]
    """Yields (index, values) of every block, once."""


class _StreamedArrayHandler(ocp.type_handlers.NumpyHandler):
    """Writes StreamedArrays as zarr arrays, one array after the other, one block in flight.

    It keeps the type name of NumPy arrays, which carry no sharding: such a leaf restores on any mesh when a target is given, and as a NumPy
    array without one.
    """

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[ocp.type_handlers.ParamInfo], args: Sequence[ocp.SaveArgs] | None = None
    ) -> list[ocp.future.Future]:
        del args
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            store = await ts.open(_zarr_spec(info.path, value), create=True, context=ts.Context({"cache_pool": {"total_bytes_limit": 0}}))
            for index, block in value.blocks():
                await store[index].write(block)
        return []


def streamed_handler() -> ocp.PyTreeCheckpointHandler:
    """The Orbax handler for a tree of StreamedArrays. A chunk is a file: a key-value database would buffer gigabytes."""
    registry = ocp.type_handlers.create_type_handler_registry((StreamedArray, _StreamedArrayHandler()))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)


def _zarr_spec(path: Any, array: StreamedArray) -> dict[str, Any]:
    location = str(path)
    return {
        "driver": "zarr",
        "kvstore": f"{location}/" if "://" in location else {"driver": "file", "path": f"{location}/"},
        "dtype": array.dtype.name,
        "metadata": {"shape": array.shape, "chunks": array.chunk_shape, "compressor": None},
        "store_data_equal_to_fill_value": True,  # a missing chunk is damage, not zeros
    }
