"""Run by test_divided_step.py in a process with eight CPU devices: one step on every mesh against the step on
one device."""

import itertools
import sys
from dataclasses import replace

import jax
import numpy as np

from aurora_jax.data.batches.loader import Batch
from aurora_jax.model.config import BLOOM, ComputeConfig, ModelConfig
from aurora_jax.model.decoder import initial_parameters, structure_of
from aurora_jax.model.division import WHOLE, Division
from aurora_jax.model.likelihood import BatchNll, Likelihood, make_loss
from aurora_jax.model.mesh import make_mesh, place
from aurora_jax.model.sharding import MESH_AXES, flatten, parameter_shardings
from aurora_jax.train.config import MeshConfig
from aurora_jax.train.step import make_gradient

jax.config.update("jax_numpy_rank_promotion", "raise")
V, L, B, MICRO_BATCHES = 64, 64, 16, 2
MODELS = {
    "multi-query": ModelConfig(V, L, 64, 2, 8, 128, layer_norm_epsilon=1e-2).with_dropout(0.0),
    "multi-head": ModelConfig(V, L, 64, 2, 8, 128, multi_query=False, layer_norm_epsilon=1e-2).with_dropout(0.0),
    "bloom": ModelConfig(V, L, 64, 2, 8, 128, **BLOOM, layer_norm_epsilon=1e-2).with_dropout(0.0),
    "padded": ModelConfig(V - 3, L, 64, 2, 8, 128, layer_norm_epsilon=1e-2, vocabulary_divisible_by=8).with_dropout(
        0.0
    ),
}


def make_batch(tokens: int) -> Batch:
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(tokens, size=(B, L + 1)).astype(np.int32)
    segments = np.cumsum(rng.random((B, L)) < 3 / L, axis=1).astype(np.int32)
    positions = np.tile(np.arange(L, dtype=np.int32), (B, 1))
    weights = (rng.random((B, L)) < 0.8).astype(np.float32)
    return Batch(tokens_BL[:, :-1], tokens_BL[:, 1:], weights, segments, positions, np.zeros(B, np.int32))


def gradient(model: ModelConfig, attention: str, isolate: bool, mesh: jax.sharding.Mesh | None, gather: str = "layer"):
    compute = ComputeConfig("float32", "float32", attention=attention, rematerialisation="full")  # type: ignore[arg-type]
    division = WHOLE if mesh is None else Division.of(mesh)
    loss = make_loss(
        structure_of(model, compute, division), compute, z_loss=1e-4, isolate_documents=isolate, division=division
    )
    # Larger than initial weights, so that every part of the model matters.
    parameters = jax.tree.map(lambda array: np.asarray(3 * array + 0.01), initial_parameters(model, 0))
    batch = make_batch(model.vocabulary_size)
    if mesh is not None:
        parameters, batch = jax.device_put(parameters, parameter_shardings(model, mesh)), place(mesh, batch)
    value, nll_BL, gradients = jax.jit(
        make_gradient(loss, MICRO_BATCHES, mesh, "float32" if gather == "step" else None)
    )(parameters, batch, None)
    return float(value), np.asarray(nll_BL), {path: np.asarray(array) for path, array in flatten(gradients).items()}


def likelihood(model: ModelConfig, attention: str, isolate: bool, mesh: jax.sharding.Mesh) -> BatchNll:
    """Of the same parameters and batch as `gradient`."""
    compute = ComputeConfig("float32", "float32", attention=attention)  # type: ignore[arg-type]
    parameters = jax.tree.map(lambda array: np.asarray(3 * array + 0.01), initial_parameters(model, 0))
    parameters = jax.device_put(parameters, parameter_shardings(model, mesh))
    return Likelihood(model, compute, mesh, isolate)(parameters, place(mesh, make_batch(model.vocabulary_size)))


def compare_likelihood(expected_nll_BL: np.ndarray, weights_BL: np.ndarray, found: BatchNll, label: str) -> None:
    np.testing.assert_allclose(found.token_nll_BL, expected_nll_BL, rtol=1e-4, atol=1e-5, err_msg=label)
    np.testing.assert_allclose(float(found.nll), (expected_nll_BL * weights_BL).sum(), rtol=1e-5, err_msg=label)
    assert float(found.weight) == weights_BL.sum(), label
    print(f"{label} likelihood: equal", flush=True)


def compare(expected, found, label: str) -> None:
    assert abs(found[0] / expected[0] - 1) < 1e-5, (label, found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5, err_msg=label)
    for path, array in expected[2].items():
        error = np.abs(found[2][path] - array).max() / np.abs(array).max()
        assert error < 1e-5, (label, path, error)
    print(f"{label}: equal", flush=True)


QUICK = ((2, 2, 1, 1, 2), (1, 2, 2, 2, 1), (1, 1, 1, 2, 4), (1, 4, 1, 1, 2), (4, 1, 1, 2, 1))


QUICK_OF = {
    "xla": {"multi-query": QUICK[:3], "multi-head": QUICK[2:3], "bloom": QUICK[1:2], "padded": QUICK[:1]},
    # What kernels see of a mesh: their part of the batch, of the heads and of the sequence, in one layer. Layers upon
    # each other, and rows that pad the vocabulary, are compared with `xla`.
    "flash_interpreted": {"multi-query": QUICK[2:3], "multi-head": QUICK[:1], "bloom": QUICK[1:2]},
}


def main(attention: str, which: str) -> None:
    shapes = [shape for shape in itertools.product((1, 2, 4, 8), repeat=len(MESH_AXES)) if np.prod(shape) == 8]
    models = MODELS if which == "all" else {name: MODELS[name] for name in QUICK_OF[attention]}
    for name, model in models.items():
        if which == "quick" and attention == "flash_interpreted":
            model = replace(model, layers=1)
        for isolate in (False, True) if which == "all" else (True,):
            expected = gradient(model, attention, isolate, None)
            for shape in shapes if which == "all" else QUICK_OF[attention][name]:
                sizes = dict(zip(MESH_AXES, shape, strict=True))
                mesh, label = make_mesh(MeshConfig(**sizes)), f"{name} {attention} {isolate} {sizes}"
                compare(expected, gradient(model, attention, isolate, mesh), label)
                weights_BL = make_batch(model.vocabulary_size).loss_weights_BL
                compare_likelihood(expected[1], weights_BL, likelihood(model, attention, isolate, mesh), label)
                if name == "multi-query" and shape[1] > 1:
                    compare(
                        expected, gradient(model, attention, isolate, mesh, gather="step"), f"{label} gathered once"
                    )


if __name__ == "__main__":
    main(*sys.argv[1:])
