"""A vocabulary padded for sharding computes what it computes without padding, and PyTorch never sees the padding.

V vocabulary, D model.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import run_on_eight_devices
from jax.sharding import AbstractMesh, NamedSharding

from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.checkpoints.metadata import require_same_architecture
from aurora_jax.data.batches.loader import Batch
from aurora_jax.errors import InputError
from aurora_jax.model import loss
from aurora_jax.model.config import PRESETS, ComputeConfig, ModelConfig, to_hf_config
from aurora_jax.model.decoder import initial_parameters, merge, structure_of
from aurora_jax.model.likelihood import make_loss
from aurora_jax.model.sharding import MESH_AXES, TABLE, flatten, parameter_shapes, rows_of
from convert import weight_map
from convert.__main__ import main
from convert.weight_map import hf_tensors

FP32 = ComputeConfig("float32", "float32")
PLAIN = ModelConfig(61, 32, 24, 2, 4, 48).with_dropout(0.0)
PADDED = replace(PLAIN, vocabulary_divisible_by=16)
EMBEDDING = "token_embedding.embedding"


def with_padding(parameters: dict) -> dict:
    """The same model with rows of padding, which are large here: a mask that forgets them is seen."""
    embedding_VD = np.asarray(parameters["token_embedding"]["embedding"])
    padded_VD = np.concatenate([embedding_VD, np.full((64 - 61, embedding_VD.shape[1]), 5.0, np.float32)])
    return {**parameters, "token_embedding": {"embedding": jnp.asarray(padded_VD)}}


def batch(B: int = 3, L: int = 20) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(PLAIN.vocabulary_size, size=(B, L + 1)).astype(np.int32)
    places = np.tile(np.arange(L, dtype=np.int32), (B, 1))
    weights = (rng.random((B, L)) < 0.8).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, np.zeros((B, L), np.int32), places, np.zeros(B, np.int32))


def value_and_gradients(config: ModelConfig, parameters: dict):
    function = make_loss(structure_of(config, FP32), FP32, z_loss=1e-2, isolate_documents=True)
    (value, nll_BL), gradients = jax.jit(jax.value_and_grad(function, has_aux=True))(
        parameters, batch(), jnp.float32(40), None
    )
    return value, nll_BL, flatten(gradients)


def test_loss_and_gradients_are_those_without_padding(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    parameters = jax.tree.map(lambda array: 3 * array + 0.01, initial_parameters(PLAIN, 0))
    value, nll_BL, expected = value_and_gradients(PLAIN, parameters)
    padded_value, padded_nll_BL, gradients = value_and_gradients(PADDED, with_padding(parameters))
    assert float(padded_value) == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(padded_nll_BL, nll_BL, rtol=1e-5, atol=1e-5)
    assert not np.any(gradients[EMBEDDING][61:])
    gradients[EMBEDDING] = gradients[EMBEDDING][:61]
    for path, gradient in expected.items():
        np.testing.assert_allclose(gradients[path], gradient, rtol=1e-4, atol=1e-6, err_msg=path)


def test_padding_has_no_probability():
    parameters = initial_parameters(PLAIN, 0)
    tokens_BL = batch().tokens_BL
    plain, padded = (
        merge(structure_of(PLAIN, FP32), parameters),
        merge(structure_of(PADDED, FP32), with_padding(parameters)),
    )
    expected, found = plain.logits(plain(tokens_BL)), padded.logits(padded(tokens_BL))
    assert found.shape[-1] == 64
    assert np.all(found[..., 61:] == -np.inf)
    np.testing.assert_allclose(found[..., :61], expected, rtol=1e-5, atol=1e-5)


def test_initial_weights_are_those_without_padding():
    plain, padded = flatten(initial_parameters(PLAIN, 7)), flatten(initial_parameters(PADDED, 7))
    assert not np.any(padded[EMBEDDING][61:])
    padded[EMBEDDING] = padded[EMBEDDING][:61]
    for path, array in plain.items():
        np.testing.assert_array_equal(padded[path], array, err_msg=path)


def test_without_padding_the_program_is_the_same():
    """The loss compiles to the program that it was before there was padding: no masks."""
    hidden, embedding = jnp.zeros((2, 8, 4)), jnp.zeros((61, 4))
    arguments = hidden, embedding, jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 8)), jnp.float32(16)

    def program(vocabulary_size: int | None) -> str:
        def value(hidden, embedding, *rest):
            return loss.cross_entropy(hidden, embedding, *rest, dtype=jnp.float32, vocabulary_size=vocabulary_size)[0]

        return jax.jit(jax.value_and_grad(value, (0, 1))).lower(*arguments).as_text()

    assert program(61) == program(None) != program(60)


@pytest.mark.parametrize("positions", [8_192, 2_048])
@pytest.mark.parametrize(("vocabulary", "padded"), [(49_152, 49_152), (49_153, 49_280), (49_280, 49_280)])
def test_real_vocabularies(tmp_path, capsys, vocabulary, padded, positions):
    """Shapes on both sides, and what `--dry-run` says of a folder of that size (a file of holes, of one layer)."""
    config = replace(PRESETS["starcoderplus"], vocabulary_size=vocabulary, max_positions=positions, layers=1)
    divisible = replace(config, vocabulary_divisible_by=128)
    assert parameter_shapes(divisible)[EMBEDDING].shape == (padded, 6_144)
    mesh = AbstractMesh((1, 1, 1, 1, 8), MESH_AXES)
    sharding = NamedSharding(mesh, TABLE[EMBEDDING].partition)
    assert sharding.shard_shape((padded, 6_144)) == (padded // 8, 6_144)

    header, end = {}, 0
    for name, parts in hf_tensors(divisible).items():
        shape = parts[0][0].hf_shape(divisible)
        assert shape == parts[0][0].hf_shape(config)
        begin, end = end, end + math.prod(shape) * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(config)))
    assert (
        main(["from-torch", str(tmp_path), str(tmp_path / "x"), "--dry-run", "--vocabulary-divisible-by", "128"]) == 0
    )
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if " transformer." in line}
    assert f"[{vocabulary}, 6144]" in lines["transformer.wte.weight"]
    assert f"[{padded}, 6144]" in lines["transformer.wte.weight"]
    assert lines["transformer.wpe.weight"].count(f"[{positions}, 6144]") == 2


@pytest.fixture
def hf(tmp_path) -> Path:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_positions": 33, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 48}
    transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**sizes)).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("divisor", [8, 64])
def test_padding_is_removed_on_export(tmp_path, hf, monkeypatch, divisor):
    """With 64, whole blocks are padding: 97 tokens, 128 rows."""
    safetensors = pytest.importorskip("safetensors.numpy")
    monkeypatch.setattr(weight_map, "CHUNK_BYTES", 500)
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["from-torch", str(hf), str(ours), "--vocabulary-divisible-by", str(divisor)]) == 0
    embedding = np.asarray(restore_parameters(ours)["token_embedding"]["embedding"])
    assert embedding.shape[0] == math.ceil(97 / divisor) * divisor
    assert not np.any(embedding[97:])
    assert main(["verify", str(hf), str(ours)]) == 0
    assert main(["to-torch", str(ours), str(back)]) == 0
    assert json.loads((back / "config.json").read_text())["vocab_size"] == 97
    expected, found = (safetensors.load_file(folder / "model.safetensors") for folder in (hf, back))
    assert {*expected} == {*found}
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


RESTORED = """
import sys
import jax, numpy as np
from aurora_jax.checkpoints.format import read_metadata
from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.model.sharding import flatten, parameter_shardings
from aurora_jax.train.config import MeshConfig
from aurora_jax.model.mesh import make_mesh
mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
shardings = parameter_shardings(read_metadata(sys.argv[1]).config, mesh)
expected = flatten(restore_parameters(sys.argv[1]))
for path, array in flatten(restore_parameters(sys.argv[1], shardings=shardings)).items():
    assert array.sharding == flatten(shardings)[path], path
    np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[path]), err_msg=path)
"""


@pytest.mark.parametrize("divisor", [1, 2])
def test_restored_on_a_mesh_that_divides_the_vocabulary(tmp_path, hf, divisor):
    assert main(["from-torch", str(hf), str(tmp_path / "ours"), "--vocabulary-divisible-by", str(divisor)]) == 0
    done = run_on_eight_devices(RESTORED, tmp_path / "ours")
    assert (done.returncode == 0) == (divisor == 2), done.stderr[-2000:]
    if divisor == 1:
        error = done.stderr.splitlines()[-1]
        assert "token_embedding.embedding" in error
        assert "--vocabulary-divisible-by" in error


def test_checkpoints_of_another_padding_are_told_apart():
    assert rows_of(PLAIN) == rows_of(PADDED)
    with pytest.raises(InputError, match=r"padded_vocabulary_size = 61.*padded_vocabulary_size = 64"):
        require_same_architecture(PLAIN, PADDED, "a", "b")
    with pytest.raises(InputError, match="vocabulary_divisible_by is 0"):
        replace(PLAIN, vocabulary_divisible_by=0)
