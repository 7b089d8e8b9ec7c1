"""Does every chip compute the same? A chip that miscalculates raises no error: its losses are a little wrong.

Some rows of a batch are read twice by the program of evaluations, the second time by the neighbours of those devices
that read them first. The same program on the same numbers gives the same bits, so a difference is a fault of one of the
two, and two differences side by side are of the device between them. (Dixit et al., "Silent data corruptions at scale",
arXiv 2102.11245, is why one looks.)

B batch, L sequence, P parts into which data and fsdp divide the batch.
"""

from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aurora_jax.data.batches.loader import Batch
from aurora_jax.errors import ChipFault
from aurora_jax.model.likelihood import GRID, ROWS, Likelihood
from aurora_jax.model.mesh import batch_parts, place, rows_of_this_process
from aurora_jax.model.sharding import BATCH_AXES, SEQUENCE_AXIS, TENSOR_AXIS


def require_twins(
    likelihood: Likelihood, parameters: dict, batch_of: Callable[[np.ndarray], Batch], batch_size: int, step: int
) -> None:
    """Reads `batch_size` rows twice, and compares to the bit. A collective over the processes.

    Args:
        batch_of: the rows of these numbers.
        batch_size: of evaluations, for which the program is compiled.
        step: for the message.

    Raises:
        ChipFault: a difference; the devices are named.
    """
    mesh = likelihood.mesh
    parts = batch_parts(mesh)
    if parts < 2:
        return
    rows, shift = rows_of_this_process(mesh, batch_size), batch_size // parts

    def read(numbers: np.ndarray) -> jax.Array:
        placed = place(mesh, batch_of(numbers), rows, batch_size)
        return likelihood(parameters, placed).token_nll_BL

    first_BL, second_BL = read(rows), read((rows + shift) % batch_size)
    differ_P = jax.device_get(_differing(mesh, parts)(first_BL, second_BL))
    if not differ_P.any():
        return
    # Part p was read by group p, and then by the group before it.
    suspects = Counter(group % parts for part in np.flatnonzero(differ_P).tolist() for group in (part, part - 1))
    most = max(suspects.values())
    named = "; or ".join(_devices(mesh, group) for group, count in sorted(suspects.items()) if count == most)
    raise ChipFault(
        f"At step {step} the same rows gave different bits on two devices: {named} miscalculates. Checkpoints may hold "
        "its mistakes: go on without that host, from a checkpoint of before this was last looked at."
    )


def _differing(mesh: Mesh, parts: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """bool [P]: whose rows differ between a reading, and one that began a part later, on any device that has them."""
    sharers = (SEQUENCE_AXIS, TENSOR_AXIS)

    def differing(first_BL: jax.Array, second_BL: jax.Array) -> jax.Array:
        again_BL = jax.lax.ppermute(second_BL, BATCH_AXES, [(part, (part + 1) % parts) for part in range(parts)])
        first_BL, again_BL = (jax.lax.bitcast_convert_type(nll_BL, jnp.uint32) for nll_BL in (first_BL, again_BL))
        return jax.lax.pmax((first_BL != again_BL).any().astype(jnp.int32), sharers)[None]

    divided = jax.shard_map(differing, mesh=mesh, in_specs=(GRID, GRID), out_specs=ROWS, check_vma=False)
    return jax.jit(divided, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _devices(mesh: Mesh, group: int) -> str:
    """Those that read one part of the batch: one, or as many as share its rows."""
    order = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
    others = [axis for axis in range(mesh.devices.ndim) if axis not in order]
    devices = mesh.devices.transpose(order + others).reshape(batch_parts(mesh), -1)[group]
    return ", ".join(f"{device} of process {device.process_index}" for device in devices)
