"""Plans: what is read from compiled programs against arithmetic and against an unrolled program; what does not fit or divide is refused.

The TPU compiler does the compiling, for chips that are not there.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from aurora_jax.cli import main
from aurora_jax.errors import InputError
from aurora_jax.model.config import PRESETS, ComputeConfig
from aurora_jax.model.sharding import TABLE, parameter_shapes
from aurora_jax.plan.chips import CHIPS, GIB
from aurora_jax.plan.command import PlanOptions, model_of, run
from aurora_jax.plan.estimate import DoesNotFit, make_plan
from aurora_jax.plan.program import read_program
from aurora_jax.plan.search import least_memory, print_ranking, search
from aurora_jax.plan.topology import tpu_topology
from aurora_jax.train.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from aurora_jax.train.stages import LearningRate, Stage
from configs import starcoderplus_v5p_128

pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, exists for Linux on x86-64 only")

# Two layers of StarCoderPlus at its full width.
MODEL = replace(PRESETS["starcoderplus"], layers=2).with_dropout(0.0)
CONFIG = TrainConfig(
    output=Path("unused"),
    stages=(Stage("cap", "nano_cap", steps=10, learning_rate=LearningRate(peak=1e-4, warmup_steps=2, final=1e-5)),),
    data=DataConfig(corpus=Path("unused"), batch_size=4, sequence_length=2048),
    model=MODEL,
    mesh=MeshConfig(fsdp=2, fsdp_inner=2),
    compute=ComputeConfig(attention="flash", rematerialisation="full"),
)


def test_a_loop_counts_as_often_as_it_runs():
    """The cycles of a scanned program against those of the same program unrolled, which has no loop to count."""
    mesh = Mesh(np.array(tpu_topology("v5e:2x2").devices)[:1], ("x",))
    here = NamedSharding(mesh, PartitionSpec())

    def layers(hidden, up, down, unroll):
        def layer(hidden, weights):
            return jnp.tanh(hidden @ weights[0]) @ weights[1], None

        return jax.lax.scan(layer, hidden, (up, down), unroll=unroll)[0]

    sizes = ((4096, 1024), (6, 1024, 8192), (6, 8192, 1024))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in sizes]
    scanned, unrolled = (
        read_program(jax.jit(layers, static_argnums=3).lower(*shapes, unroll).compile().as_text()).cycles for unroll in (1, 6)
    )
    assert scanned == pytest.approx(unrolled, rel=0.1)


@pytest.fixture(scope="module")
def plans():
    return {name: make_plan(CONFIG, MODEL, name) for name in ("v5e:2x2", "v5p:2x2x1")}


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_bytes_of_collectives_are_those_of_arithmetic(plans, topology):
    """Each matrix is gathered in bf16 along both axes, twice a layer with everything rematerialised, and its gradient scattered once."""
    gathered = scattered = 0.0
    for path, shape in parameter_shapes(MODEL).items():
        if not any(isinstance(entry, tuple) and "fsdp" in entry for entry in TABLE[path].partition):
            continue
        whole = math.prod(shape.shape) * 2
        once = whole / 2 / 2 + whole / 2
        gathered += once * (2 if path.startswith("layers.") else 1)
        scattered += once
    rows = plans[topology].collectives
    found = {kind: sum(row.gigabytes for row in rows if row.kind == kind) for kind in ("all-gather", "reduce-scatter", "all-reduce")}
    assert found["all-gather"] == pytest.approx(gathered / 1e9, rel=0.05)
    # An all-reduce of a whole matrix sends twice what a reduce-scatter does: what was not scattered must not have come back as one.
    assert found["reduce-scatter"] + found["all-reduce"] / 2 == pytest.approx(scattered / 1e9, rel=0.05)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_plan_is_within_what_is_possible(plans, topology):
    plan, chip = plans[topology], CHIPS[topology.partition(":")[0]]
    parameters = sum(math.prod(shape.shape) for shape in parameter_shapes(MODEL).values())
    assert plan.parameters == parameters
    assert plan.memory_parameters == pytest.approx(parameters * 4 / 4, rel=0.01)
    assert plan.memory_optimizer == pytest.approx(2 * plan.memory_parameters, rel=0.01)
    assert plan.memory_parameters + plan.memory_optimizer < plan.memory_peak < chip.hbm
    assert 0.2 < plan.mfu < 1
    # Matrix products alone, four passes with rematerialisation, at the chip's peak.
    least = 8 * (parameters - MODEL.max_positions * MODEL.width) * plan.tokens / 4 / chip.peak
    assert least * 0.75 < plan.compute_seconds < 2 * least
    assert plan.kernel_seconds > 0


def test_what_does_not_fit_says_by_how_much_and_what_would():
    long = replace(CONFIG, data=replace(CONFIG.data, batch_size=64), compute=replace(CONFIG.compute, rematerialisation="nothing"))
    with pytest.raises(DoesNotFit, match="does not fit: a chip would need") as error:
        make_plan(long, MODEL, "v5e:2x2")
    assert error.value.needed > error.value.available > 15 * GIB
    with pytest.raises(InputError, match=r"Smallest change that fits: --compute\.rematerialisation"):
        run(long, PlanOptions(topology="v5e:2x2"), Console(quiet=True))


@pytest.mark.parametrize(
    ("change", "topology", "message"),
    [
        ({"data": replace(CONFIG.data, batch_size=6)}, "v5e:2x2", "must be a multiple of 4"),
        ({"optimizer": OptimizerConfig(micro_batches=2)}, "v5e:2x2", "must be a multiple of 8"),
        ({"mesh": MeshConfig(fsdp=1, tensor=5)}, "v5e:2x2", "does not fit 4 devices"),
        ({"mesh": MeshConfig(fsdp=-1, tensor=32), "data": replace(CONFIG.data, batch_size=8)}, "v5e:16x16", "heads 48 cannot be divided"),
        ({"data": replace(CONFIG.data, sequence_length=16_384)}, "v5e:2x2", "exceeds the model's 8192"),
        ({}, "v9:2x2", "no chip 'v9'"),
        ({}, "v5e:3x2", "named like v5p:4x4x4"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_compiling(change, topology, message):
    with pytest.raises(InputError, match=message):
        make_plan(replace(CONFIG, **change), MODEL, topology)


def test_command(plans, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("aurora_jax.plan.estimate.make_plan", lambda *_: plans["v5p:2x2x1"])
    options = PlanOptions(topology="v5p:2x2x1", picture=tmp_path / "plan.png", json=tmp_path / "plan.json", price=5.0)
    run(CONFIG, options, Console(width=120))
    printed = capsys.readouterr().out
    for words in ("HBM a chip", "MFU, at most", "435B tokens", "$5.00 a chip-hour", "reduce-scatter", "left out"):
        assert words in printed
    assert json.loads(options.json.read_text())["tokens"] == 4 * 2048
    assert options.picture.stat().st_size > 10_000


def test_search_ranks_goes_on_where_it_stopped_and_leaves_out_what_cannot_win(plans, tmp_path, capsys):
    """The planner is a stand-in with the arithmetic of a real one: every candidate takes its bound, more for each micro-batch."""
    model, config = PRESETS["starcoderplus"], replace(CONFIG, data=replace(CONFIG.data, batch_size=512, sequence_length=8192))
    asked: list[TrainConfig] = []

    def planner(config, model, topology, slices):
        asked.append(config)
        if config.optimizer.micro_batches == 1:
            raise DoesNotFit(100 * GIB, 95 * GIB)
        slower = {"nothing": 1.0, "products": 1.1, "attention": 1.4, "full": 1.5}[config.compute.rematerialisation]
        return replace(plans["v5p:2x2x1"], compute_seconds=14 * slower + 0.1 * config.optimizer.micro_batches, chips=64)

    def searched(budget):
        console = Console(width=140)
        return search(config, model, "v5p:4x4x4", 1, tmp_path / "log.jsonl", console, budget=budget, planner=planner)

    first = searched(4)
    asked_first = len(asked)
    found = searched(16)
    assert asked_first <= 4
    assert len(asked) <= 16
    assert len({str(config) for config in asked}) == len(asked)
    assert first[0] in found
    seconds = [plan["step_seconds"] for _, plan in found]
    assert seconds == sorted(seconds)
    assert all(least_memory(candidate, config, model) < CHIPS["v5p"].hbm for candidate, _ in found)
    print_ranking(found, Console(width=140))
    assert f"--mesh.fsdp {found[0][0].fsdp}" in capsys.readouterr().out
    with pytest.raises(InputError, match="No mesh over 4 chips"):
        search(config, model, "v5p:2x2x1", 1, tmp_path / "other.jsonl", Console(quiet=True), budget=1, planner=planner)


def test_models_and_topologies_by_name(capsys):
    assert main(["plan", "--list"]) == 0
    assert "v6e:16x16" in capsys.readouterr().out
    assert model_of(CONFIG, "starcoderbase-3b") == PRESETS["starcoderbase-3b"]
    with pytest.raises(InputError, match="is no preset"):
        model_of(CONFIG, "starcoderminus")
    with pytest.raises(InputError, match="--model starcoderplus"):
        model_of(replace(CONFIG, model=None, initial_checkpoint=Path("/nowhere")), None)
    assert main(["plan", "configs/nowhere.py"]) == 2


@pytest.mark.full
def test_gradients_of_the_whole_model_are_reduce_scattered():
    """On 64 chips: half the bytes of the all-reduces of whole matrices that a single fsdp axis gives."""
    config = starcoderplus_v5p_128.config()
    config = replace(config, compute=ComputeConfig(attention="flash", rematerialisation="full"), optimizer=OptimizerConfig())
    rows = make_plan(config, PRESETS["starcoderplus"], "v5p:4x4x4").collectives
    sent = {kind: sum(row.gigabytes for row in rows if row.kind == kind) for kind in ("all-gather", "reduce-scatter", "all-reduce")}
    assert sent["all-reduce"] < 0.02 * sent["reduce-scatter"]
    assert sent["reduce-scatter"] == pytest.approx(sent["all-gather"] / 2, rel=0.05)
