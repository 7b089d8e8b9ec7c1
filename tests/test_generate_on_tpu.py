"""The decoding loop, compiled by the TPU compiler: what it reads for a token is the weights and the cache, once."""

from dataclasses import replace

import pytest

from aurora_jax.generate.generator import ROWS_ON_TPU
from aurora_jax.model.config import PRESETS
from aurora_jax.plan.decoding import DecodingPlan, plan_decoding

pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
MODEL = PRESETS["starcoderplus"]
POSITIONS_BYTES = MODEL.max_positions * MODEL.width * 2
"""Of the table of learned positions, whole on every chip; a token reads a row of it."""


def planned(layers: int, topology: str, batch_size: int) -> DecodingPlan:
    return plan_decoding(
        replace(MODEL, layers=layers), topology, batch_size=batch_size, prompt_slots=1_792, new_tokens=256
    )


def test_weights_and_cache_are_read_once():
    plan = planned(2, "v5e:2x4", ROWS_ON_TPU)
    needed = plan.weight_bytes - POSITIONS_BYTES + plan.cache_bytes
    assert 0.98 < plan.read_bytes / needed < 1.02
    # Reading takes as long as it must: the compiler's cycles do not add to it much.
    assert plan.seconds < 1.2 * needed / 819e9


def test_a_single_row_would_leave_the_matrix_unit():
    """Why `Generator` runs two rows on TPU where one is asked for."""
    assert planned(2, "v5e:2x4", 1).cycles > 2 * planned(2, "v5e:2x4", ROWS_ON_TPU).cycles


@pytest.mark.full
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
def test_starcoderplus_on_eight_chips(topology):
    plan = planned(MODEL.layers, topology, ROWS_ON_TPU)
    assert plan.read_bytes < 1.1 * plan.weight_bytes
    assert plan.peak_bytes < 16e9
