"""What a run of StarCoderPlus (15.5B) does besides its step, for the TPU compiler: the first state and the
evaluation fit on each chip."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from aurora_jax.cli import load_config
from aurora_jax.model.config import PRESETS
from aurora_jax.model.mesh import make_mesh
from aurora_jax.model.sharding import parameter_count
from aurora_jax.plan.estimate import bytes_a_chip, plan_evaluation
from aurora_jax.plan.topology import tpu_topology
from aurora_jax.train.program import Program

pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, exists for Linux on x86-64 only")

MODEL = PRESETS["starcoderplus"]
WEIGHTS = 2 * parameter_count(MODEL)
"""Bytes in the precision of the products."""
CONFIGS = Path(__file__).parents[1] / "configs"


def peak(lowered: jax.stages.Lowered) -> int:
    """Bytes of HBM on a chip."""
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    return memory.peak_memory_in_bytes


def program_on(name: str, topology: str, slices: int, across: bool = True) -> Program:
    config = load_config(CONFIGS / f"starcoderplus_{name}.py")
    config = replace(config, data=replace(config.data, attend_across_documents=across))
    return Program(config, MODEL, make_mesh(config.mesh, tpu_topology(topology, slices).devices))


V5E = ("v5e_256", "v5e:16x16", 1)
OTHERS = [
    ("v6e_256", "v6e:16x16", 1),
    ("v4_256", "v4:4x4x8", 1),
    ("v5p_128", "v5p:4x4x4", 1),
    ("two_v5p_128", "v5p:4x4x4", 2),
]


@pytest.mark.full
@pytest.mark.parametrize(("name", "topology", "slices"), [V5E, *OTHERS])
def test_the_first_state_takes_no_more_than_itself(name, topology, slices):
    program = program_on(name, topology, slices)
    resident = bytes_a_chip(program.shapes)
    assert peak(program.state_around.lower(program.shapes.parameters)) < 1.01 * resident
    assert peak(program.random_state.lower()) < 1.05 * resident


@pytest.mark.full
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize(("name", "topology", "slices"), [V5E, *OTHERS])
def test_an_evaluation_fits_beside_the_state(name, topology, slices, across):
    """With the masks of training, whichever they are."""
    program = program_on(name, topology, slices, across)
    plan = plan_evaluation(program.config, MODEL, topology, slices)  # raises DoesNotFit
    assert plan.gigabytes * 1e9 < 1.1 * WEIGHTS  # gathered once, and next to nothing else
    assert plan.seconds < 2 * plan.least_seconds
