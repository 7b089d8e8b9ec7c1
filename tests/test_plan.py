"""Plans: what is read from compiled programs against arithmetic and against an unrolled program; what does
not fit or divide is refused.

The TPU compiler does the compiling, for chips that are not there.
"""

import json
import math
import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from aurora_jax.chips import CHIPS, GIB
from aurora_jax.cli import load_config, main
from aurora_jax.errors import InputError
from aurora_jax.model.config import PRESETS, ComputeConfig
from aurora_jax.model.mesh import make_mesh
from aurora_jax.model.sharding import TABLE, parameter_count, parameter_shapes
from aurora_jax.plan.attention_cycles import attention_cycles
from aurora_jax.plan.estimate import BelowPhysics, DoesNotFit, bytes_gathered_once, make_plan, plan_evaluation
from aurora_jax.plan.plan_command import PlanOptions, model_of, run
from aurora_jax.plan.program import read_program
from aurora_jax.plan.search import least_memory, print_ranking, search, write_config
from aurora_jax.plan.topology import tpu_topology
from aurora_jax.train.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from aurora_jax.train.program import Program
from aurora_jax.train.stages import LearningRate, Stage

pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, exists for Linux on x86-64 only")

# Two layers of StarCoderPlus at its full width.
MODEL = replace(PRESETS["starcoderplus"], layers=2).with_dropout(0.0)
CONFIG = TrainConfig(
    output=Path("unused"),
    stages=(Stage("cap", "nano_cap", steps=10, learning_rate=LearningRate(peak=1e-4, warmup_steps=2, final=1e-5)),),
    data=DataConfig(corpus="unused", batch_size=4, sequence_length=2048),
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
        read_program(jax.jit(layers, static_argnums=3).lower(*shapes, unroll).compile().as_text(), CHIPS["v5e"]).cycles
        for unroll in (1, 6)
    )
    assert scanned == pytest.approx(unrolled, rel=0.1)


@pytest.mark.parametrize(
    "product", ["bld,df->blf", "bld,dhc->bhlc", "bhlc,hcd->bld", "bhqc,bhkc->bhqk", "bqhc,bkhc->bhqk", "bld,blhc->dhc"]
)
def test_products_of_a_compiled_program_are_counted_exactly(product):
    """Against arithmetic: the compiler writes heads and batches as windows with padding. No instruction is faster than
    its products at the chip's peak, whatever the compiler estimates."""
    sizes = dict(zip("bldhcfqk", (2, 256, 384, 4, 128, 512, 256, 256), strict=True))
    left, right = product.partition("->")[0].split(",")
    here = NamedSharding(Mesh(np.array(tpu_topology("v5e:2x2").devices)[:1], ("x",)), PartitionSpec())
    shapes = [
        jax.ShapeDtypeStruct([sizes[axis] for axis in operand], jnp.bfloat16, sharding=here)
        for operand in (left, right)
    ]
    text = jax.jit(lambda left, right: jnp.einsum(product, left, right)).lower(*shapes).compile().as_text()
    flops = 2 * math.prod(sizes[axis] for axis in set(left + right))
    as_if_free = re.sub(r'"estimated_cycles":"\d+"', '"estimated_cycles":"1"', text)
    least = flops / (CHIPS["v5e"].peak / CHIPS["v5e"].clock)
    assert read_program(as_if_free, CHIPS["v5e"]).cycles == pytest.approx(least, abs=20)
    slow = re.sub(r'"estimated_cycles":"\d+"', '"estimated_cycles":"1000000"', text)
    assert read_program(slow, CHIPS["v5e"]).cycles >= 1_000_000


def test_no_plan_computes_faster_than_the_chips_can(monkeypatch):
    """A program that reads as nearly nothing (a new compiler's, say) is refused; an MFU above 1 is not printed."""

    class Compiled:
        def as_text(self):
            return "ENTRY %main () -> f32[8] {\n" + PRODUCT.format(0, 1000) + "\n}"

        def memory_analysis(self):
            return SimpleNamespace(peak_memory_in_bytes=GIB)

    monkeypatch.setattr("aurora_jax.plan.estimate.compiled", lambda _: Compiled())
    with pytest.raises(BelowPhysics, match="published peak"):
        make_plan(CONFIG, MODEL, "v5e:2x2")


def test_a_product_that_is_written_in_another_way_is_not_taken_for_free():
    line = (
        "ENTRY %main () -> bf16[8,8] {\n  %p = bf16[8,8]{1,0} convolution(bf16[8,8] %a, bf16[8,8] %b), "
        "dim_labels=bf_io->bf\n}"
    )
    with pytest.raises(InputError, match="product of the compiled program cannot be read"):
        read_program(line, CHIPS["v5e"])


@pytest.fixture(scope="module")
def plan_of():
    """Plans by topology, each made once."""
    return cache(partial(make_plan, CONFIG, MODEL))


TOPOLOGIES = pytest.mark.parametrize("topology", ["v5e:2x2", pytest.param("v5p:2x2x1", marks=pytest.mark.full)])


@TOPOLOGIES
def test_bytes_of_collectives_are_those_of_arithmetic(plan_of, topology):
    """Each matrix is gathered in bf16 along both axes, twice a layer with everything rematerialised, and its
    gradient scattered once."""
    gathered = scattered = 0.0
    for path, shape in parameter_shapes(MODEL).items():
        if not any(isinstance(entry, tuple) and "fsdp" in entry for entry in TABLE[path].partition):
            continue
        whole = math.prod(shape.shape) * 2
        once = whole / 2 / 2 + whole / 2
        gathered += once * (2 if path.startswith("layers.") else 1)
        scattered += once
    rows = plan_of(topology).collectives
    found = {
        kind: sum(row.gigabytes for row in rows if row.kind == kind)
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    }
    assert found["all-gather"] == pytest.approx(gathered / 1e9, rel=0.05)
    # An all-reduce of a whole matrix sends twice what a reduce-scatter does: what was not scattered must not
    # have come back as one.
    assert found["reduce-scatter"] + found["all-reduce"] / 2 == pytest.approx(scattered / 1e9, rel=0.05)


@TOPOLOGIES
def test_attention_is_no_faster_than_its_products_at_the_published_peak(plan_of, topology):
    """Two and five products of the causal triangle in steps of 128 places, by 4 units of 128 x 128; a
    sequence a chip, forward twice."""
    generation = topology.split(":")[0]
    cycles = attention_cycles(
        generation, 48, 1, 128, 2048, alibi=False
    )  # those that the plans were made with, not compiled again
    one_product = 48 * sum(128 * keys for keys in range(128, 2048 + 1, 128)) * 128 // (4 * 128 * 128)
    assert cycles["forward floor"] == 2 * one_product <= cycles["forward"]
    assert cycles["backward floor"] == 5 * one_product <= cycles["backward"]
    cores = CHIPS[generation].clock * CHIPS[generation].cores
    assert plan_of(topology).kernel_seconds * cores >= MODEL.layers * (2 * 2 + 5) * one_product


# Lines as two generations of the compiler write them; a product runs between the start and the end of each collective.
PRODUCT = (
    "  %p{0} = bf16[64]{{0}} fusion(%a, %b), kind=kOutput, "
    'backend_config={{"window_config":{{"estimated_cycles":"{1}"}}}}'
)
SPARSE = """
%called.1 (param.0: bf16[1024], param.1: token[]) -> bf16[128] {{
  ROOT %rs = bf16[128]{{0}} reduce-scatter(%param.0), channel_id=1, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}
}}, execution_thread="sparsecore"

ENTRY %main (a: bf16[64]) -> bf16[64] {{
  %c1 = ((bf16[1024]{{0}}, token[]), bf16[128]{{0}}) call-start(%x, %t), async_execution_thread="sparsecore", to_apply=%called.1
{0}
  %g = (bf16[64]{{0}}, bf16[256]{{0}}) all-gather-start(%y), channel_id=2, replica_groups=mesh['a'=4,'b'=2] {{'a'}}, dimensions={{0}}
{1}
  %c1d = bf16[128]{{0}} call-done(%c1)
{2}
  %gd = bf16[256]{{0}} all-gather-done(%g)
  %r = bf16[512]{{0}} all-reduce(%z), channel_id=3, replica_groups=mesh['a'=4,'b'=2] {{'a','b'}}, to_apply=%add
}}
"""


def test_collectives_in_flight_together_share_what_hides_them():
    products = [PRODUCT.format(place, cycles) for place, cycles in enumerate((100, 1000, 10))]
    program = read_program(SPARSE.format(*products), CHIPS["v6e"])
    assert program.cycles == 1110
    scatter, reduction, gather = sorted(program.collectives, key=lambda each: each.kind, reverse=True)
    assert (scatter.kind, scatter.group, scatter.bytes) == ("reduce-scatter", 8, 2048)
    assert (gather.kind, gather.group, gather.bytes) == ("all-gather", 4, 512)
    assert (reduction.kind, reduction.group, reduction.bytes, reduction.hidden_cycles) == ("all-reduce", 8, 1024, 0)
    sent = 2048 * 7 / 8, 512 * 3 / 4
    assert scatter.hidden_cycles == int(100 + 1000 * sent[0] / sum(sent))
    assert gather.hidden_cycles == int(10 + 1000 * sent[1] / sum(sent))


PODS = (
    pytest.param("v5p:4x4x4", 16, 4, marks=pytest.mark.full),
    pytest.param("v5e:16x16", 16, 16, marks=pytest.mark.full),
    pytest.param("v6e:16x16", 8, 32, marks=pytest.mark.full),
)


@pytest.mark.parametrize(("topology", "fsdp", "inner"), PODS)
def test_no_gradient_of_a_matrix_is_all_reduced_on_a_pod(topology, fsdp, inner):
    """The meshes of our configs, on which the compiler makes reduce-scatters; over one flat axis it would
    all-reduce whole matrices."""
    config = replace(
        CONFIG, data=replace(CONFIG.data, batch_size=fsdp * inner), mesh=MeshConfig(fsdp=fsdp, fsdp_inner=inner)
    )
    compiled = Program(config, MODEL, make_mesh(config.mesh, tpu_topology(topology).devices)).lower_step().compile()
    program = read_program(compiled.as_text(), CHIPS[topology.partition(":")[0]])
    matrix = MODEL.width * MODEL.width * 2
    in_layers = [each for each in program.collectives if each.times > 1]
    assert [each for each in in_layers if each.kind == "all-reduce" and each.bytes >= matrix] == []
    layers = sum(
        math.prod(shape.shape) * 2
        for path, shape in parameter_shapes(MODEL).items()
        if TABLE[path].partition[1:] and "kernel" in path
    )
    # All but the narrow matrix of keys and values, which some pods all-reduce.
    assert program.wire_bytes("reduce-scatter") >= layers * (1 - 1 / fsdp / inner) * 0.98


@pytest.mark.parametrize(
    ("topology", "mesh", "across"),
    [
        ("v5e:4x4", (4, 4, 1, 1), False),
        pytest.param("v5e:4x4", (2, 2, 2, 2), True, marks=pytest.mark.full),
        pytest.param("v5e:4x4", (4, 4, 1, 1), True, marks=pytest.mark.full),
        pytest.param("v5e:4x4", (2, 2, 2, 2), False, marks=pytest.mark.full),
        pytest.param("v5p:2x2x4", (16, 1, 1, 1), True, marks=pytest.mark.full),
        pytest.param("v5p:2x2x4", (16, 1, 1, 1), False, marks=pytest.mark.full),
    ],
)
def test_an_evaluation_sends_the_weights_and_little_else(topology, mesh, across):
    """With the kernels inside. A program that the compiler divides by itself sums whole activations instead."""
    fsdp, inner, sequence, tensor = mesh
    config = replace(
        CONFIG,
        data=replace(CONFIG.data, batch_size=16, attend_across_documents=across),
        evaluation=replace(CONFIG.evaluation, batch_size=16),
        mesh=MeshConfig(fsdp=fsdp, fsdp_inner=inner, sequence=sequence, tensor=tensor),
    )
    plan = plan_evaluation(config, MODEL, topology)
    assert plan.kernel_seconds > 0
    weights = 2 * parameter_count(MODEL) / tensor
    # Over `tensor` each layer's activations are summed twice, over `sequence` keys and values are gathered.
    activations = 2 * 2 * MODEL.layers * plan.tokens / (fsdp * inner * sequence) * MODEL.width * 4
    assert plan.gigabytes * 1e9 < 1.1 * weights + (tensor > 1) * activations


@TOPOLOGIES
def test_plan_is_within_what_is_possible(plan_of, topology):
    plan, chip = plan_of(topology), CHIPS[topology.partition(":")[0]]
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


@pytest.mark.parametrize("tensor", [1, 2])
def test_weights_that_are_gathered_once_are_told_apart(tensor):
    """Two bytes for each weight of the layers' matrices; all but those of keys and values are divided over `tensor`."""
    mesh = make_mesh(replace(CONFIG.mesh, fsdp_inner=2 // tensor, tensor=tensor), tpu_topology("v5e:2x2").devices)
    D, F, KV = MODEL.width, MODEL.mlp_width, 2 * MODEL.head_dim
    expected = 2 * MODEL.layers * ((2 * D * D + 2 * D * F) // tensor + D * KV)
    assert bytes_gathered_once(replace(CONFIG, mesh=replace(CONFIG.mesh, gather="step")), MODEL, mesh) == expected
    assert bytes_gathered_once(CONFIG, MODEL, mesh) == 0


@pytest.mark.parametrize(
    ("written", "members"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("mesh['data'=2,'fsdp'=4] {'data'}", (0, 4)),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", tuple(range(8))),
    ],
)
def test_groups_in_every_way_of_writing_them(written, members):
    line = (
        f"ENTRY %main () -> f32[8] {{\n  %a = f32[8]{{0}} all-reduce(%b), replica_groups={written}, to_apply=%add\n}}"
    )
    assert read_program(line, CHIPS["v5e"]).collectives[0].members == members


@pytest.mark.full
def test_two_slices_add_up_gradients_over_the_network():
    """Over `data` a chip sends its part of every gradient, in fp32, once a step; the network between slices
    is slow, and said to be."""
    config = replace(CONFIG, mesh=MeshConfig(data=2, fsdp=2, fsdp_inner=2), data=replace(CONFIG.data, batch_size=8))
    plan = make_plan(config, MODEL, "v5p:2x2x1", slices=2)
    across = [row for row in plan.collectives if "data" in row.axis]
    assert plan.chips == 8
    assert sum(row.gigabytes for row in across) == pytest.approx(plan.memory_parameters / 1e9, rel=0.02)
    assert sum(row.seconds for row in across) == pytest.approx(plan.memory_parameters / CHIPS["v5p"].network, rel=0.02)


def test_a_mesh_whose_slices_are_not_along_data_is_refused():
    with pytest.raises(InputError, match="cannot be divided over 2"):
        make_plan(replace(CONFIG, mesh=MeshConfig(fsdp=4, fsdp_inner=2)), MODEL, "v5p:2x2x1", slices=2)


LONG = replace(
    CONFIG, data=replace(CONFIG.data, batch_size=64), compute=replace(CONFIG.compute, rematerialisation="nothing")
)
WHAT_FITS = r"does not fit: a chip would need.*Smallest change that fits: --compute\.rematerialisation"


def test_what_does_not_fit_says_what_would(plan_of, monkeypatch):
    """The planner is a stand-in: whatever keeps activations does not fit."""

    def planner(config, *_):
        if config.compute.rematerialisation == "nothing":
            raise DoesNotFit(17 * GIB, 16 * GIB)
        return plan_of("v5e:2x2")

    monkeypatch.setattr("aurora_jax.plan.estimate.make_plan", planner)
    with pytest.raises(InputError, match=WHAT_FITS):
        run(LONG, PlanOptions(topology="v5e:2x2"), Console(quiet=True))


@pytest.mark.full
def test_what_does_not_fit_says_by_how_much_and_what_would(monkeypatch):
    refusals = []

    def watched(*arguments):
        try:
            return make_plan(*arguments)
        except DoesNotFit as error:
            refusals.append(error)
            raise

    monkeypatch.setattr("aurora_jax.plan.estimate.make_plan", watched)
    with pytest.raises(InputError, match=WHAT_FITS):
        run(LONG, PlanOptions(topology="v5e:2x2"), Console(quiet=True))
    assert refusals[0].needed > refusals[0].available > 15 * GIB


@pytest.mark.parametrize(
    ("change", "topology", "message"),
    [
        ({"data": replace(CONFIG.data, batch_size=6)}, "v5e:2x2", "must be a multiple of 4"),
        ({"optimizer": OptimizerConfig(micro_batches=2)}, "v5e:2x2", "must be a multiple of 8"),
        ({"mesh": MeshConfig(fsdp=1, tensor=5)}, "v5e:2x2", "does not fit 4 devices"),
        (
            {"mesh": MeshConfig(fsdp=-1, tensor=32), "data": replace(CONFIG.data, batch_size=8)},
            "v5e:16x16",
            "heads 48 cannot be divided",
        ),
        ({"data": replace(CONFIG.data, sequence_length=16_384)}, "v5e:2x2", "learned 8192 positions only"),
        ({}, "v9:2x2", "no chip 'v9'"),
        ({}, "v5e:3x2", "named like v5p:4x4x4"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_compiling(change, topology, message):
    with pytest.raises(InputError, match=message):
        make_plan(replace(CONFIG, **change), MODEL, topology)


def test_command(plan_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("aurora_jax.plan.estimate.make_plan", lambda *_: plan_of("v5e:2x2"))
    options = PlanOptions(topology="v5e:2x2", picture=tmp_path / "plan.png", json=tmp_path / "plan.json", price=5.0)
    run(CONFIG, options, Console(width=120))
    printed = capsys.readouterr().out
    for words in ("HBM a chip", "MFU, at most", "435B tokens", "$5.00 a chip-hour", "reduce-scatter", "left out"):
        assert words in printed
    assert json.loads(options.json.read_text())["tokens"] == 4 * 2048
    assert options.picture.stat().st_size > 10_000


def test_search_ranks_goes_on_where_it_stopped_and_leaves_out_what_cannot_win(plan_of, tmp_path, capsys):
    """The planner is a stand-in with the arithmetic of a real one: every candidate takes its bound, more for
    each micro-batch."""
    model, config = (
        PRESETS["starcoderplus"],
        replace(CONFIG, data=replace(CONFIG.data, batch_size=512, sequence_length=8192)),
    )
    asked: list[TrainConfig] = []

    def planner(config, model, topology, slices):
        asked.append(config)
        if config.optimizer.micro_batches == 1:
            raise DoesNotFit(100 * GIB, 95 * GIB)
        slower = {"nothing": 1.0, "products": 1.1, "attention": 1.4, "full": 1.5}[config.compute.rematerialisation]
        return replace(plan_of("v5e:2x2"), compute_seconds=14 * slower + 0.1 * config.optimizer.micro_batches, chips=64)

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
    best = found[0][0].apply(config)
    write_config(best, found[0][1], tmp_path / "best.py")
    assert load_config(tmp_path / "best.py") == best
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


CONFIGS = {path.stem: path for path in sorted(Path(__file__).parents[1].glob("configs/starcoderplus_*.py"))}


@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
def test_configs_fit_with_a_tenth_to_spare(name):
    """Compiles the whole model for the pod that a config is written for: five minutes each."""
    topology = next(name for name in re.findall(r"--topology (\S+)", CONFIGS[name].read_text()))
    slices = 2 if "_two_" in name else 1
    plan = make_plan(load_config(CONFIGS[name]), PRESETS["starcoderplus"], topology, slices)
    assert plan.tokens == 4_194_304
    assert plan.memory_peak < 0.9 * plan.memory_capacity
    (stated,) = re.findall(r"([\d.]+) s a step", CONFIGS[name].read_text())
    assert plan.step_seconds == pytest.approx(float(stated), rel=0.02)
