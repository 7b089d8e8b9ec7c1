"""Run by test_several_processes.py, once for each process: one step on a mesh over all processes against the
step on one device."""

import sys

import jax
import numpy as np

port, processes, process = (int(argument) for argument in sys.argv[1:])
jax.config.update("jax_num_cpu_devices", 8 // processes)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", processes, process)

from divided_step import MODELS, B, compare, gradient, make_batch  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

from aurora_jax.model.config import ComputeConfig  # noqa: E402
from aurora_jax.model.decoder import initial_parameters, structure_of  # noqa: E402
from aurora_jax.model.division import Division  # noqa: E402
from aurora_jax.model.likelihood import make_loss  # noqa: E402
from aurora_jax.model.mesh import make_mesh, place, rows_of_this_process  # noqa: E402
from aurora_jax.model.sharding import flatten, parameter_shardings  # noqa: E402
from aurora_jax.train.config import MeshConfig  # noqa: E402
from aurora_jax.train.step import make_gradient  # noqa: E402

model = MODELS["multi-query"]
assert jax.device_count() == 8
found = {}
for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "fsdp_inner": 2, "sequence": 2}):
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    division, compute = Division.of(mesh), ComputeConfig("float32", "float32", rematerialisation="full")
    loss = make_loss(
        structure_of(model, compute, division), compute, z_loss=1e-4, isolate_documents=True, division=division
    )
    parameters = jax.tree.map(lambda array: np.asarray(3 * array + 0.01), initial_parameters(model, 0))
    rows, batch = rows_of_this_process(mesh, B), make_batch(model.vocabulary_size)
    assert len(rows) < B, "each process has its own rows"
    here = place(mesh, type(batch)(*(array[rows] for array in batch)), rows, B)
    value, nll_BL, gradients = jax.jit(make_gradient(loss, 2, mesh))(
        jax.device_put(parameters, parameter_shardings(model, mesh)), here, None
    )
    whole = [multihost_utils.process_allgather(array, tiled=True) for array in (value, nll_BL, gradients)]
    found[f"{processes} processes {sizes}"] = float(whole[0]), whole[1], flatten(whole[2])
if process == 0:  # all have gathered the same
    with jax.default_device(jax.local_devices()[0]):
        expected = gradient(model, "xla", True, None)
    for label, one in found.items():
        compare(expected, one, label)
