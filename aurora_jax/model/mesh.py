"""The mesh of a run: its devices along the axes of the sharding table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aurora_jax.errors import InputError
from aurora_jax.model.sharding import BATCH_AXES, MESH_AXES, SEQUENCE_AXIS

Arrays = TypeVar("Arrays")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (one axis at most) takes what the others leave."""

    data: int = 1
    """Across slices: everything is replicated, gradients are added up over the data-center network."""
    fsdp: int = -1
    """Weights are stored in parts and gathered where they are used."""
    fsdp_inner: int = 1
    """A second axis of the same kind: two that follow the torus (16 x 16 on v5e, 4 x 16 on 64 v5p) let the
    compiler reduce-scatter."""
    sequence: int = 1
    """Divides the places of a sequence; keys and values are gathered along it."""
    tensor: int = 1
    """Divides heads, feed-forward columns and the vocabulary."""
    gather: Literal["layer", "step"] = "layer"
    """When weights are gathered along fsdp: by each layer, each time it is computed; or all once a step, kept
    whole in the precision of the products (2 bytes a parameter on every chip) for all micro-batches."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices as a mesh, laid along their torus, and `data` over slices where there are several.

    Args:
        devices: those of this run, or of a topology that is only compiled for; `jax.devices()` without them.

    Raises:
        InputError: the product of the axes is not the number of devices, or `data` cannot be divided over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    if sizes.count(-1) == 1:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = len(devices) // known if len(devices) % known == 0 else 0
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh {config} does not fit {len(devices)} devices: the product of its axes must be that number "
            "(one may be -1)."
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif sizes[0] % slices:
        raise InputError(
            f"mesh {config}: the data axis runs over slices, and {sizes[0]} cannot be divided over {slices} of them."
        )
    else:
        inside, across = [sizes[0] // slices, *sizes[1:]], [slices, *(1 for _ in sizes[1:])]
        array = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Devices along data and fsdp, over which the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def rows_of_this_process(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, ascending; int64 [rows]. A host reads no others."""
    slices = NamedSharding(mesh, PartitionSpec(BATCH_AXES)).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def place(mesh: Mesh, batch: Arrays, rows: np.ndarray | None = None, batch_size: int | None = None) -> Arrays:
    """A batch (a tuple of arrays [B, L] or [B]) on the mesh: rows over data and fsdp, places over `sequence`.

    Args:
        mesh: where to.
        batch: the whole batch, or `rows` of it.
        rows: as `rows_of_this_process` gives them; None for a whole batch.
        batch_size: of the whole batch, if `rows` are given.
    """

    def put(array):
        partition = PartitionSpec(BATCH_AXES, SEQUENCE_AXIS) if array.ndim == 2 else PartitionSpec(BATCH_AXES)
        sharding = NamedSharding(mesh, partition)
        if sharding.is_fully_addressable and rows is None:
            return jax.device_put(array, sharding)

        shape = (batch_size or len(array), *array.shape[1:])
        shards = []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None  # of a device of this process
            wanted = np.arange(shape[0])[index[0]]
            first = wanted[0] if rows is None else np.searchsorted(rows, wanted[0])
            shards.append(jax.device_put(array[(slice(first, first + len(wanted)), *index[1:])], device))
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    return jax.tree.map(put, batch)
