"""The weight map against transformers' own modules of both families: names, shapes, and which number goes where."""

import jax
import numpy as np
import pytest

from aurora_jax.model.config import BLOOM, PRESETS, ModelConfig, to_hf_config
from aurora_jax.model.sharding import MESH_AXES, TABLE, parameter_count, parameter_shapes
from convert import weight_map as module
from convert.weight_map import hf_tensors, weight_map

CONFIGS = {
    "multi-query": ModelConfig(vocabulary_size=41, max_positions=13, width=20, layers=2, heads=5, mlp_width=27),
    "multi-head": ModelConfig(
        vocabulary_size=41, max_positions=13, width=20, layers=2, heads=5, mlp_width=27, multi_query=False
    ),
    "bloom": ModelConfig(vocabulary_size=41, max_positions=13, width=20, layers=2, heads=5, mlp_width=80, **BLOOM),
}


@pytest.fixture(params=CONFIGS)
def config(request) -> ModelConfig:
    return CONFIGS[request.param]


def test_every_parameter_has_one_row(config):
    assert [row.ours for row in weight_map(config)] == list(parameter_shapes(config))


@pytest.mark.parametrize(
    "name", [*CONFIGS, "starcoderbase-1b", "aurora-m", *(name for name in PRESETS if name.startswith("bloom"))]
)
def test_names_and_shapes_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = {**CONFIGS, **PRESETS}[name]
    hf_config = to_hf_config(config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf_config))
    assert [type(model).__name__] == hf_config["architectures"]
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: parts[0][0].hf_shape(config) for name, parts in hf_tensors(config).items()} == theirs
    assert model.num_parameters() == parameter_count(config)


def test_parts_cover_each_tensor_exactly_once(config):
    for name, parts in hf_tensors(config).items():
        rows = [
            row
            for part, _ in parts
            for start, stop in part.spans(config, 0, part.units(config))
            for row in range(start, stop)
        ]
        assert sorted(rows) == list(range(parts[0][0].hf_shape(config)[0])), name


def test_fused_projection_is_split_as_transformers_splits_it(config):
    """GPTBigCodeAttention: multi-query rows are [all queries, key, value]; multi-head rows, BLOOM's too,
    [head, (query, key, value)]."""
    D, H, C = config.width, config.heads, config.head_dim
    rows_of = {row.ours: row for row in weight_map(config)}
    query, key_value = (rows_of[f"layers.attention.{part}.kernel"] for part in ("query", "key_value"))
    fused = np.random.default_rng(0).normal(size=query.hf_shape(config))

    def part(row):
        rows = [fused[start:stop] for start, stop in row.spans(config, 0, row.units(config))]
        return row.to_ours(np.concatenate(rows), config)

    hidden_D = np.random.default_rng(1).normal(size=D)
    projected = fused @ hidden_D
    if config.multi_query:
        queries, keys, values = projected[: H * C].reshape(H, C), projected[H * C : H * C + C], projected[H * C + C :]
        keys, values = keys[None], values[None]
    else:
        queries, keys, values = projected.reshape(H, 3, C).transpose(1, 0, 2)
    np.testing.assert_allclose(np.einsum("d,dhc->hc", hidden_D, part(query)), queries)
    np.testing.assert_allclose(np.einsum("d,dxkc->xkc", hidden_D, part(key_value)), np.stack([keys, values]))


def test_blocks_rebuild_the_array_and_invert(config, monkeypatch):
    """Blocks of any size, put where the map says, make our array; back through `to_hf` they make the rows again."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    for row in weight_map(config):
        shape = row.hf_shape(config)
        tensor = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        ours = np.full(parameter_shapes(config)[row.ours].shape, -1, np.float32)
        chunk = row.chunk_shape(config, 4)
        for layer in range(config.layers if row.stacked else 1):
            for start, stop in row.blocks(config, 4):
                rows = np.concatenate([tensor[first:last] for first, last in row.spans(config, start, stop)])
                block = row.to_ours(rows, config)
                index = row.index(layer, start, stop)
                assert start % chunk[row.unit_axis + row.stacked] == 0, "a block must begin where a chunk does"
                ours[index] = block
                np.testing.assert_array_equal(row.to_hf(ours[index], config), rows, err_msg=row.ours)
        assert not np.any(ours == -1), row.ours


LARGER_UNITS = {("bloom", "layers.attention.key_value.kernel"): 14_336 * 2 * 128 * 4}
"""Bytes of blocks that are larger than CHUNK_BYTES: key and value of one head of BLOOM 176B in fp32."""


def test_blocks_are_bounded_whatever_the_model():
    for name, config in PRESETS.items():
        for row in weight_map(config):
            block = np.prod(row.block_shape(config, row.block_units(config, 4))) * 4
            assert block <= LARGER_UNITS.get((name, row.ours), module.CHUNK_BYTES), (name, row.ours)
            assert np.prod(row.chunk_shape(config, 4)) * 4 <= module.CHUNK_BYTES, (name, row.ours)
            assert sum(stop - start for start, stop in row.blocks(config, 4)) == row.units(config)


@pytest.mark.parametrize("model", ["starcoderplus", "aurora-m", "starcoderbase-3b", "bloom-7b1"])
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "fsdp_inner": 4}])
def test_devices_read_little_but_their_own(model, mesh):
    """Bytes of all chunks that each device's shards touch, against the bytes of the shards."""
    config = PRESETS[model]
    devices = jax.sharding.AbstractMesh(tuple(mesh.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    read = own = 0
    for row in weight_map(config):
        shape = parameter_shapes(config)[row.ours].shape
        shard = jax.sharding.NamedSharding(devices, TABLE[row.ours].partition).shard_shape(shape)
        chunk = row.chunk_shape(config, 2)
        own += np.prod(shard)
        # The shard that begins where it touches most chunks; a shard's place is a multiple of its size.
        touched = [
            max(-(-(start + part) // size) - start // size for start in range(0, whole, part)) * size
            for whole, part, size in zip(shape, shard, chunk, strict=True)
        ]
        read += np.prod(touched)
    assert own <= read <= 1.05 * own
