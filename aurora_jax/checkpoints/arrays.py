"""A checkpoint's arrays: read into any mesh and dtype, or by slices, and held to their checksums."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from itertools import islice, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils

from aurora_jax.checkpoints import checksums
from aurora_jax.checkpoints.checksums import Checksum, paths_of
from aurora_jax.checkpoints.format import PARAMETERS, damage_named, read_metadata, read_metadata_of, resolve
from aurora_jax.checkpoints.metadata import Contents
from aurora_jax.errors import Damaged, InputError
from aurora_jax.model.config import PADDING_HINT
from aurora_jax.model.decoder import check_parameters
from aurora_jax.model.sharding import TABLE, flatten, nest
from aurora_jax.storage.places import Location

READERS = 4
"""Threads that read chunks."""


def restore_parameters(
    path: Location, *, dtype: jnp.dtype | str | None = None, shardings: Mapping[str, Any] | None = None
) -> dict:
    """The decoder's parameters, each read straight into its shards: a process reads those of its own devices,
    some at a time. They are what was written, to the bit, before they are rounded to another dtype.

    Args:
        path: a checkpoint, or a run (its newest complete step).
        dtype: dtype of the arrays; that of the checkpoint without it.
        shardings: nested dictionary with a `jax.sharding.Sharding` for each parameter; without it, everything
            is on the first device.

    Returns:
        Nested dictionary of `jax.Array`, layers stacked: what `decoder.merge` takes.

    Raises:
        InputError: not a checkpoint, or parameters that do not fit its config or that the shardings cannot
            divide.
        Damaged: files that are missing, or arrays that are not what was written.
    """
    directory = resolve(path)
    config = read_metadata_of(directory).config
    described = _described_arrays(directory, PARAMETERS)
    stored = {name: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for name, leaf in described.items()}
    check_parameters(config, nest(stored))
    _require_chunks(directory / PARAMETERS, described)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding_of = flatten(shardings) if shardings is not None else dict.fromkeys(stored, one_device)
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype or leaf.dtype), sharding=sharding_of[name])
        for name, leaf in stored.items()
    }
    return restore_arrays(directory, PARAMETERS, nest(targets))


def restore_arrays(directory: epath.Path, item: str, targets: Any) -> Any:
    """The arrays of an item, proved; all processes return them, or all raise.

    Those that are stored in another dtype are read as they are, proved, and then converted: one at a time, so that no
    two copies of all of them meet in memory.

    Args:
        targets: a tree of `jax.ShapeDtypeStruct` with shardings, as the item was written.

    Raises:
        Damaged: files that cannot be read, or arrays that are not what was written; the first few are named.
    """
    contents = read_metadata_of(directory).contents
    described = _described_arrays(directory, item)
    wanted = paths_of(targets)
    if missing := [name for name in wanted if name not in described]:
        raise Damaged(f"{directory / item}: the checkpoint is damaged: it does not have {', '.join(missing[:3])}")
    alike = [name for name, leaf in wanted.items() if described[name].dtype == leaf.dtype]
    groups = [alike, *([name] for name in wanted if name not in alike)]
    # Without a limit Orbax reads all shards at once, and holds everything twice.
    largest = max(_bytes_to_read(name, described[name], leaf.sharding) for name, leaf in wanted.items())
    restored: dict[str, jax.Array] = {}
    with closing(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + largest // 10**9)) as handler:
        for group in filter(None, groups):
            arrays = _restored(handler, directory / item, targets, {name: described[name].dtype for name in group})
            _require_unchanged(checksums.of_arrays(arrays), contents, directory, item)
            restored.update({name: _as(array, wanted[name].dtype) for name, array in arrays.items()})
    return jax.tree.unflatten(jax.tree.structure(targets), [restored[name] for name in wanted])


def _restored(
    handler: ocp.PyTreeCheckpointHandler, item: epath.Path, targets: Any, dtypes: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """The arrays that `dtypes` names; Orbax passes over the rest. What one process cannot read, all raise."""
    asked = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtypes[name], sharding=leaf.sharding) if name in dtypes else ...
        for name, leaf in paths_of(targets).items()
    }
    tree = jax.tree.unflatten(jax.tree.structure(targets), asked.values())
    arguments = [
        ocp.RestoreArgs()
        if leaf is ...
        else ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
        for leaf in asked.values()
    ]
    restore_args = jax.tree.unflatten(jax.tree.structure(targets), arguments)
    failure: Exception | None = None
    arrays: dict[str, jax.Array] = {}
    try:
        with damage_named(item):
            restored = handler.restore(item, args=ocp.args.PyTreeRestore(item=tree, restore_args=restore_args))
            arrays = {name: array for name, array in paths_of(restored).items() if name in dtypes}
            jax.block_until_ready(arrays)
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            failed = np.ravel(multihost_utils.process_allgather(np.array([failure is not None])))
        if failed.any() and failure is None:
            raise Damaged(f"{item}: process {int(np.flatnonzero(failed)[0])} cannot read its part; its log says why")
    if failure is not None:
        raise failure
    return arrays


def _as(array: jax.Array, dtype: Any) -> jax.Array:
    """In the same shards."""
    return array if array.dtype == dtype else _conversion(array.sharding, jnp.dtype(dtype))(array)


@cache
def _conversion(sharding: jax.sharding.Sharding, dtype: jnp.dtype) -> jax.stages.Wrapped:
    return jax.jit(lambda array: array.astype(dtype), out_shardings=sharding)


def _require_unchanged(
    found: Mapping[str, Checksum], contents: Contents | None, directory: Location, item: str = PARAMETERS
) -> None:
    """Raises Damaged, with the names, if arrays are not those that were written."""
    if contents is None:
        return
    if differing := checksums.changed(found, contents.checksums.get(item, {})):
        more = f"; {len(differing) - 3} more" if len(differing) > 3 else ""
        raise Damaged(f"{directory}: the checkpoint is damaged: in {item}, {'; '.join(differing[:3])}{more}")


def prove_arrays(directory: epath.Path, item: str, advance: Callable[[int], None]) -> None:
    """Reads every array of an item, some chunks at a time, and compares: memory stays at some megabytes.

    Args:
        advance: is told how many bytes of arrays have been read.

    Raises:
        Damaged: files that cannot be read, or arrays that are not what was written.
    """
    contents = read_metadata_of(directory).contents
    described = _described_arrays(directory, item)
    _require_chunks(directory / item, described)
    found: dict[str, Checksum] = {}
    with damage_named(directory / item), ThreadPoolExecutor(READERS) as pool:
        for name, store in _opened(directory / item, described).items():

            def checksum(part: tuple[slice, ...], store: ts.TensorStore = store) -> Checksum:
                values = np.asarray(store[part].read().result())
                advance(values.nbytes)
                return checksums.of_part(values, [along.start for along in part], store.shape)

            parts, found[name] = _chunks(store), Checksum()
            while some := list(islice(parts, 4 * READERS)):
                found[name] += checksums.sum_of(pool.map(checksum, some))
    _require_unchanged(found, contents, directory, item)


def _chunks(store: ts.TensorStore) -> Iterator[tuple[slice, ...]]:
    """The parts of an array that lie in one stored chunk each."""
    steps = store.chunk_layout.read_chunk.shape or ()
    ranges = [range(0, size, step or size) for size, step in zip(store.shape, steps, strict=True)]
    for starts in product(*ranges):
        yield tuple(
            slice(start, min(start + along.step, size))
            for start, along, size in zip(starts, ranges, store.shape, strict=True)
        )


def require_parameters(path: Location, found: Mapping[str, Checksum]) -> None:
    """Of who has read the arrays that `open_parameters` gave: are they what was written?

    Args:
        found: the checksum of every array, over all of it.

    Raises:
        Damaged: they are not; they are named.
    """
    directory = resolve(path)
    _require_unchanged(found, read_metadata_of(directory).contents, directory)


def stored_arrays(path: Location, item: str = PARAMETERS) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of an item, by dotted path; no array is read. Raises InputError."""
    return {
        name: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
        for name, leaf in _described_arrays(resolve(path), item).items()
    }


def _described_arrays(directory: epath.Path, name: str) -> dict[str, Any]:
    """Orbax's metadata of every array of an item by dotted path: shape, dtype, chunks."""
    item = directory / name
    with closing(ocp.StandardCheckpointHandler()) as handler, damage_named(item):
        return paths_of(handler.metadata(item).tree)


def _bytes_to_read(name: str, leaf: Any, sharding: jax.sharding.Sharding) -> int:
    """Upper bound of the bytes of one device's shard and of the chunks that it cuts across. Raises InputError
    if there is no such shard."""
    try:
        shard = sharding.shard_shape(tuple(leaf.shape))
    except ValueError as error:
        hint = f" {PADDING_HINT}" if name in TABLE and TABLE[name].letters.startswith("V") else ""
        raise InputError(f"{name} {tuple(leaf.shape)} cannot be divided over the mesh: {error}.{hint}") from None
    elements = 1
    for whole, part, chunk in zip(leaf.shape, shard, leaf.storage.chunk_shape, strict=True):
        chunks = -(-whole // chunk)
        elements *= chunk * min(chunks, part // chunk if part % chunk == 0 else part // chunk + 2)
    return elements * leaf.dtype.itemsize


def open_parameters(path: Location, cache_bytes: int = 0) -> dict[str, ts.TensorStore]:
    """Every array of a checkpoint's `params` by dotted path, open for reading slices; nothing is loaded.

    Args:
        path: a checkpoint, or a run (its newest complete step).
        cache_bytes: decoded chunks that are kept, for readers whose slices cut across the stored chunks.

    Raises:
        InputError: not a checkpoint, or parameters that do not fit its config.
    """
    item = resolve(path) / PARAMETERS
    stored = stored_arrays(path)
    check_parameters(read_metadata(path).config, nest(stored))
    _require_chunks(item, _described_arrays(item.parent, PARAMETERS))
    return _opened(item, stored, cache_bytes)


def _opened(item: epath.Path, names: Iterable[str], cache_bytes: int = 0) -> dict[str, ts.TensorStore]:
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    stores = {}
    with damage_named(item):
        for name in names:
            spec = {"driver": "zarr", "kvstore": _location(item, f"{name}/"), "fill_missing_data_reads": False}
            stores[name] = ts.open(spec, read=True, context=context)
        return {name: store.result() for name, store in stores.items()}


def _location(item: epath.Path, folder: str = "") -> Any:
    """TensorStore's name for a folder of an item: its files, or its part of Orbax's database."""

    def files(path: str) -> Any:  # a path as it is: in an address TensorStore would read %41 as A
        return path if "://" in path else {"driver": "file", "path": path}

    if (item / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": files(f"{item}/"), "path": folder}
    return files(f"{item}/{folder}")


def _require_chunks(item: epath.Path, described: Mapping[str, Any]) -> None:
    """Raises InputError, naming it, if a chunk of an array is missing: all are written, also those of zeros."""
    with damage_named(item):
        there = set(ts.KvStore.open(_location(item)).result().list().result())
    for name, leaf in described.items():
        grid = [range(-(-size // chunk)) for size, chunk in zip(leaf.shape, leaf.storage.chunk_shape, strict=True)]
        for place in product(*grid):
            key = f"{name}/{'.'.join(map(str, place)) or '0'}"
            if key.encode() not in there:
                raise Damaged(f"{item}: the checkpoint is damaged or incomplete: the chunk {key} is missing")
