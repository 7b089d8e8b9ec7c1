"""Run by test_generate.py in a process with eight CPU devices: completions on every mesh against those of one
device."""

import jax
import numpy as np

from aurora_jax.generate.generator import Generator, make_inference_mesh, shardings
from aurora_jax.generate.sampling import Sampling
from aurora_jax.model.config import BLOOM, ComputeConfig, ModelConfig
from aurora_jax.model.sharding import nest, parameter_shapes

jax.config.update("jax_numpy_rank_promotion", "raise")
V = 64
MODELS = {
    "multi-query": ModelConfig(V, 256, 64, 2, 8, 128),
    "multi-head": ModelConfig(V, 256, 64, 2, 8, 128, multi_query=False),
    "bloom": ModelConfig(V, 256, 64, 2, 8, 128, **BLOOM),
}
FP32 = ComputeConfig("float32", "float32")
SETTINGS = {"greedy": Sampling(), "drawn": Sampling(1.0, 20, 0.9, 1.3)}


def main() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, V, length).tolist() for length in (3, 70, 1, 33, 12)]
    for name, model in MODELS.items():
        # Large enough that attention is far from uniform and completions do not repeat one token.
        shapes = {path: shape.shape for path, shape in parameter_shapes(model).items()}
        parameters = nest(
            {path: rng.normal(path.endswith("scale"), 0.4, shape).astype(np.float32) for path, shape in shapes.items()}
        )
        alone = Generator(model, jax.device_put(parameters), FP32)
        expected = {kind: alone(prompts, 40, sampling=sampling, eos_ids=(0,)) for kind, sampling in SETTINGS.items()}
        assert (
            len({tuple(completion.tokens) for completions in expected.values() for completion in completions}) >= 8
        ), name
        for tensor in (1, 2, 8) if name == "multi-query" else (4,):
            mesh = make_inference_mesh(model, jax.devices(), tensor)
            placed = jax.device_put(parameters, shardings(model, mesh))
            kernel = placed["layers"]["mlp"]["up"]["kernel"]
            assert kernel.addressable_shards[0].data.size == kernel.size // tensor
            divided = Generator(model, placed, FP32, mesh)
            for kind, sampling in SETTINGS.items():
                assert divided(prompts, 40, sampling=sampling, eos_ids=(0,)) == expected[kind], (name, tensor, kind)
                print(f"{name}, tensor {tensor}, {kind}: equal", flush=True)
    assert make_inference_mesh(MODELS["multi-query"], jax.devices()).shape["tensor"] == 8


main()
