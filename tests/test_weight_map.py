"""The weight map against GPTBigCode's own module: names, shapes, and which number goes where."""

import numpy as np
import pytest

from aurora_jax.model.config import PRESETS, ModelConfig, to_hf_config
from aurora_jax.model.sharding import TABLE, parameter_shapes
from convert import weight_map
from convert.weight_map import WEIGHT_MAP, hf_tensors

CONFIGS = {
    "multi-query": ModelConfig(vocabulary_size=41, max_positions=13, width=20, layers=2, heads=5, mlp_width=27),
    "multi-head": ModelConfig(vocabulary_size=41, max_positions=13, width=20, layers=2, heads=5, mlp_width=27, multi_query=False),
}


@pytest.fixture(params=CONFIGS)
def config(request) -> ModelConfig:
    return CONFIGS[request.param]


def test_every_parameter_has_one_row():
    assert sorted(row.ours for row in WEIGHT_MAP) == sorted(TABLE)


@pytest.mark.parametrize("name", [*CONFIGS, "starcoderbase-1b", "aurora-m"])
def test_names_and_shapes_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = {**CONFIGS, **PRESETS}[name]
    with torch.device("meta"):
        model = transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**to_hf_config(config)))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: parts[0][0].hf_shape(config) for name, parts in hf_tensors(config).items()} == theirs


def test_parts_cover_each_tensor_exactly_once(config):
    for name, parts in hf_tensors(config).items():
        rows = [row for part, _ in parts for start, stop in part.spans(config, 0, part.units(config)) for row in range(start, stop)]
        assert sorted(rows) == list(range(parts[0][0].hf_shape(config)[0])), name


def test_fused_projection_is_split_as_gpt_bigcode_splits_it(config):
    """GPTBigCodeAttention: multi-query rows are [all queries, key, value]; multi-head rows are [head, (query, key, value)]."""
    D, H, C = config.width, config.heads, config.head_dim
    query, key_value = (next(row for row in WEIGHT_MAP if row.ours == f"layers.attention.{part}.kernel") for part in ("query", "key_value"))
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


@pytest.mark.parametrize("row", WEIGHT_MAP, ids=lambda row: row.ours)
def test_blocks_rebuild_the_array_and_invert(config, row, monkeypatch):
    """Blocks of any size, put where the map says, make our array; back through `to_hf` they make the rows again."""
    monkeypatch.setattr(weight_map, "CHUNK_BYTES", 100)
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
            np.testing.assert_array_equal(row.to_hf(ours[index], config), rows)
    assert not np.any(ours == -1)


def test_blocks_are_bounded_whatever_the_model():
    for config in PRESETS.values():
        for row in WEIGHT_MAP:
            assert np.prod(row.chunk_shape(config, 4)) * 4 <= weight_map.CHUNK_BYTES
            assert sum(stop - start for start, stop in row.blocks(config, 4)) == row.units(config)
