"""What a run of StarCoderPlus (15.5B) does besides its step, for the TPU compiler: the first state and the
evaluation fit on each chip."""

from pathlib import Path

import jax
import pytest

from aurora_jax.chips import CHIPS
from aurora_jax.cli import load_config
from aurora_jax.evaluate.bits_per_byte import make_sums
from aurora_jax.model.config import PRESETS
from aurora_jax.model.decoder import structure_of
from aurora_jax.model.mesh import make_mesh
from aurora_jax.plan.estimate import bytes_a_chip
from aurora_jax.plan.step import abstract_batch
from aurora_jax.plan.topology import tpu_topology
from aurora_jax.train.state import make_random_state, make_state_around, state_shapes

pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, exists for Linux on x86-64 only")

MODEL = PRESETS["starcoderplus"]
CONFIGS = Path(__file__).parents[1] / "configs"


def peak(lowered: jax.stages.Lowered) -> int:
    """Bytes of HBM on a chip."""
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    return memory.peak_memory_in_bytes


def on_mesh(name: str, topology: str, slices: int):
    config = load_config(CONFIGS / f"starcoderplus_{name}.py")
    mesh = make_mesh(config.mesh, tpu_topology(topology, slices).devices)
    return config, mesh, state_shapes(MODEL, config.optimizer, mesh)


V5E = ("v5e_256", "v5e:16x16", 1)
OTHERS = [
    ("v6e_256", "v6e:16x16", 1),
    ("v4_256", "v4:4x4x8", 1),
    ("v5p_128", "v5p:4x4x4", 1),
    ("two_v5p_128", "v5p:4x4x4", 2),
]
LONG = [pytest.param(*each, marks=pytest.mark.full) for each in OTHERS]


@pytest.mark.parametrize(("name", "topology", "slices"), [V5E, *LONG])
def test_the_first_state_takes_no_more_than_itself(name, topology, slices):
    config, mesh, shapes = on_mesh(name, topology, slices)
    resident = bytes_a_chip(shapes)
    assert peak(make_state_around(MODEL, config.optimizer, mesh).lower(shapes.parameters)) < 1.01 * resident
    assert peak(make_random_state(MODEL, config.optimizer, mesh, seed=0).lower()) < 1.05 * resident


@pytest.mark.full
@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize(("name", "topology", "slices"), [V5E, *OTHERS])
def test_an_evaluation_fits_beside_the_state(name, topology, slices, isolate):
    """With the masks of training, whichever they are."""
    config, mesh, shapes = on_mesh(name, topology, slices)
    batch = abstract_batch(config.evaluation.batch_size, config.data.sequence_length, mesh)
    with jax.set_mesh(mesh):
        sums = make_sums(structure_of(MODEL, config.compute), config.compute, isolate_documents=isolate)
        evaluation = jax.jit(sums).lower(shapes.parameters, batch)
    beside = bytes_a_chip(shapes) - bytes_a_chip(shapes.parameters)
    assert peak(evaluation) + beside < CHIPS[topology.partition(":")[0]].hbm
