"""Run by test_samples.py in processes with eight CPU devices together: continuations on training meshes against those
of one device, and the weights, which must stay as they were."""

import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

if len(sys.argv) > 1:
    port, processes, process = map(int, sys.argv[1:])
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process)

from aurora_jax.data.text.tokenizer import tokenizer_from
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.mesh import make_mesh
from aurora_jax.model.sharding import nest, parameter_shapes, parameter_shardings
from aurora_jax.train.config import EvaluationConfig, MeshConfig
from aurora_jax.train.samples import Sampler

jax.config.update("jax_numpy_rank_promotion", "raise")
MODEL = ModelConfig(264, 128, 64, 2, 8, 128)
EVALUATION = EvaluationConfig(prompts=(("fi", "Hyvää"), ("ja", "日本"), ("code", "def f(")), max_new_tokens=24)
TOKENIZER = tokenizer_from("bytes")


def sampler(mesh: jax.sharding.Mesh) -> Sampler:
    return Sampler(EVALUATION, MODEL, ComputeConfig("float32", "float32"), mesh, TOKENIZER, (TOKENIZER.eos_id,))


rng = np.random.default_rng(0)
shapes = {path: shape.shape for path, shape in parameter_shapes(MODEL).items()}
parameters = nest(
    {path: rng.normal(path.endswith("scale"), 0.4, shape).astype(np.float32) for path, shape in shapes.items()}
)
assert jax.device_count() == 8
one = make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])
expected = sampler(one)(jax.device_put(parameters, parameter_shardings(MODEL, one)))
assert len({each["continuation"] for each in expected}) == 3
MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "fsdp_inner": 2, "sequence": 2}, {"fsdp": 8})
for sizes in MESHES[:1] if jax.process_count() > 1 else MESHES[1:]:
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    placed = jax.device_put(parameters, parameter_shardings(MODEL, mesh))
    sample = sampler(mesh)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):  # as the training loop has them
        assert sample(placed) == expected, sizes
        assert sample(placed) == expected, f"{sizes}: a second time"
    whole = multihost_utils.process_allgather(placed, tiled=True)
    jax.tree.map(np.testing.assert_array_equal, whole, parameters)
    print(f"{sizes}: equal", flush=True)
