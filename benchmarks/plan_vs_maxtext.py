"""StarCoderPlus's training step on TPU pods, ours and MaxText's, as the real TPU compiler makes them: no TPU is needed.

    python benchmarks/plan_vs_maxtext.py [--json FILE]               # three pods, some 15 minutes on two cores
    python benchmarks/plan_vs_maxtext.py --scaling [--picture FILE]  # the same batch on 64 to 1,024 v5p too: half an
                                                                     # hour more
    python benchmarks/plan_vs_maxtext.py --run-maxtext PYTHON        # MaxText compiled anew, not taken from the table

4,194,304 tokens a step as 512 sequences of 8,192, 15.5B parameters. One estimator for both sides: the compiler's cycles
with loop trip counts at the chip's clock, the attention kernels' scheduled cycles, both at least what their matrix
products take at the chip's published peak, and what collectives send over the published bandwidth of the
links that they span, less what runs meanwhile. MaxText's attention is splash attention with its best tiles
and fused backward kernel (`benchmarks/flash_attention.py`); its model has no biases and RMSNorm, ours has
biases and LayerNorm. MaxText's recorded cycles are the compiler's alone, from before products were held to
the peak: holding them to it could only raise them.

What was compiled is kept in `--plans`, and not compiled again. PYTHON is an interpreter, 3.12 or newer, with
maxtext[tpu]==0.2.5.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aurora_jax.chips import CHIPS  # noqa: E402
from aurora_jax.model.config import PRESETS  # noqa: E402
from aurora_jax.model.flops import flops_per_token  # noqa: E402
from aurora_jax.plan.estimate import make_plan  # noqa: E402
from aurora_jax.plan.program import read_program  # noqa: E402
from aurora_jax.plan.topology import ENVIRONMENT  # noqa: E402
from aurora_jax.storage import json_lines  # noqa: E402
from aurora_jax.train.config import MeshConfig, TrainConfig  # noqa: E402
from configs import starcoderplus_v5e_256, starcoderplus_v5p_128, starcoderplus_v6e_256  # noqa: E402

MODEL = PRESETS["starcoderplus"]
LENGTH, SEQUENCES = 8_192, 512
TOKENS = LENGTH * SEQUENCES
SPLASH = {"v5e": (8.710e6, 19.009e6), "v5p": (9.181e6, 19.138e6), "v6e": (6.131e6, 11.125e6)}
"""Cycles of a causal layer of 48 heads at 8,192, forward and backward, as `benchmarks/flash_attention.py`
counts them: each block its bundles, or its products at the published peak if that is more (2026-11-25; in
bundles v5e's and v5p's backward passes are 17.310e6 and 17.408e6)."""


@dataclass(frozen=True)
class MaxText:
    """MaxText's step on a pod."""

    chips: int
    setting: str
    cycles: float
    gigabytes: float
    """Sent by a chip, of collectives that are synchronous."""
    micro_batches: int
    forward_passes: int
    """Of the attention kernel: two if it is computed again for the backward pass."""
    peak: float
    """GB a chip."""
    compile_seconds: float
    options: tuple[str, ...] = ()
    """Its configuration keys for that setting."""

    def seconds(self, generation: str) -> float:
        """A step, by the same estimate as ours."""
        chip = CHIPS[generation]
        forward, backward = SPLASH[generation]
        kernels = SEQUENCES / self.chips * MODEL.layers * (self.forward_passes * forward + backward) / chip.cores
        return (self.cycles + kernels) / chip.clock + self.gigabytes * 1e9 / chip.interconnect


SCRATCH = "compile_xla_flags=--xla_tpu_scoped_vmem_limit_kib=98304"
BEST = {
    "v5p:4x4x4": MaxText(
        64,
        "4 micro-batches, products and context kept",
        26.5e9,
        486,
        4,
        1,
        73.3,
        380,
        ("gradient_accumulation_steps=4", "remat_policy=minimal_with_context", SCRATCH),
    ),
    "v5e:16x16": MaxText(
        256,
        "2 micro-batches, output projections kept",
        16.2e9,
        246,
        2,
        2,
        13.2,
        401,
        ("gradient_accumulation_steps=2", "remat_policy=save_out_proj", SCRATCH),
    ),
    "v6e:16x16": MaxText(
        256, "products offloaded to the host", 5.32e9, 124, 1, 1, 25.2, 550, ("remat_policy=minimal_offloaded", SCRATCH)
    ),
}
"""The best of those that were tried, August 2026, jax 0.10.2, libtpu 0.0.42.1. An offloaded context counts as
free of cost."""
_KEPT = ("remat_policy=minimal_with_context", SCRATCH)
SCALING = {
    "v5p:4x8x8": MaxText(256, "products and context kept", 6.61e9, 123.4, 1, 1, 69.0, 560, _KEPT),
    "v5p:8x8x8": MaxText(512, "products and context kept", 4.03e9, 123.2, 1, 1, 35.2, 264, _KEPT),
}
"""The same batch on more v5p: MaxText 0.2.5, jax 0.12.0.1, libtpu 0.0.52, compiled by `--run-maxtext` on 2026-11-23."""


STARCODERPLUS = (
    "run_name=x",
    "enable_checkpointing=false",
    "dataset_type=synthetic",
    "compile_topology_num_slices=1",
    "decoder_block=llama2",
    "base_emb_dim=6144",
    "base_num_query_heads=48",
    "base_num_kv_heads=1",
    "head_dim=128",
    "base_mlp_dim=24576",
    "base_num_decoder_layers=40",
    "vocab_size=49152",
    "logits_via_embedding=true",
    "trainable_position_size=8192",
    "attention=flash",
    'mlp_activations=["gelu"]',
    "ici_fsdp_parallelism=-1",
    "max_target_length=8192",
)
"""MaxText's configuration keys for the same shape."""


@dataclass(frozen=True)
class Benchmark:
    """Our training step and MaxText's on TPU pods, as the TPU compiler makes them."""

    topologies: tuple[str, ...] = tuple(BEST)
    scaling: bool = False
    """Also the same batch on 64 to 1,024 chips of v5p."""
    run_maxtext: Path | None = None
    """A Python that has MaxText: compile its best settings anew."""
    plans: Path = Path("plan_vs_maxtext.jsonl")
    """Where plans are kept, a line each."""
    picture: Path | None = None
    """Draw the scaling curve to this file."""
    json: Path | None = None
    """Write the figures to this file."""


CONFIGS = {
    "v5p:4x4x4": starcoderplus_v5p_128.config,
    "v5e:16x16": starcoderplus_v5e_256.config,
    "v6e:16x16": starcoderplus_v6e_256.config,
}
POD_MESHES = {
    ("v5p:4x4x4", 1): (MeshConfig(fsdp=16, fsdp_inner=4, gather="step"), 8),
    ("v5p:4x4x8", 1): (MeshConfig(fsdp=16, fsdp_inner=8, gather="step"), 4),
    ("v5p:4x8x8", 1): (MeshConfig(fsdp=16, fsdp_inner=16, gather="step"), 2),
    ("v5p:8x8x8", 1): (MeshConfig(fsdp=16, fsdp_inner=32, gather="step"), 1),
    ("v5p:8x8x16", 1): (MeshConfig(fsdp=16, fsdp_inner=32, sequence=2, gather="step"), 1),
    ("v5p:4x8x8", 2): (MeshConfig(data=2, fsdp=16, fsdp_inner=16, gather="step"), 1),
}
"""Mesh and micro-batches of the same global batch on more and more chips."""


def on_pod(topology: str, slices: int) -> TrainConfig:
    """The config of 64 v5p on another number of chips."""
    mesh, micro_batches = POD_MESHES[topology, slices]
    config = starcoderplus_v5p_128.config()
    optimizer = replace(config.optimizer, micro_batches=micro_batches)
    evaluation = replace(config.evaluation, batch_size=mesh.data * mesh.fsdp * mesh.fsdp_inner)
    return replace(config, mesh=mesh, optimizer=optimizer, evaluation=evaluation)


def planned(config: TrainConfig, topology: str, slices: int, kept: Path, console: Console) -> dict:
    """The plan of a config, from the file of plans if it is there."""
    key = {
        "topology": topology,
        "slices": slices,
        "mesh": str(config.mesh),
        "compute": str(config.compute),
        "optimizer": str(config.optimizer),
    }
    for record in json_lines.read_log(kept) if kept.exists() else ():
        if record["key"] == key:
            return record["plan"]
    with console.status(f"compiling for {slices} x {topology}: some five minutes"):
        plan = make_plan(config, MODEL, topology, slices).as_dict()
    json_lines.mend_log(kept)
    with kept.open("ab") as file:
        file.write(json_lines.line_of({"key": key, "plan": plan}))
    return plan


def compile_maxtext(python: Path, topology: str, recorded: MaxText, folder: Path, console: Console) -> MaxText:
    """MaxText's step compiled now, with the recorded setting."""
    generation = topology.partition(":")[0]
    name = f"v5p-{2 * recorded.chips}" if generation == "v5p" else f"{generation}-{recorded.chips}"
    program = (folder / f"maxtext_{name}.hlo").resolve()
    sizes = (
        f"compile_topology={name}",
        f"per_device_batch_size={SEQUENCES // recorded.chips // recorded.micro_batches}",
    )
    command = [python, ROOT / "benchmarks" / "maxtext_program.py", program, *STARCODERPLUS, *sizes, *recorded.options]
    environment = {**os.environ, **ENVIRONMENT, "JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
    with console.status(f"compiling MaxText for {name}: some ten minutes"):
        done = subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True, check=False
        )
    if not program.exists():
        raise SystemExit(f"MaxText did not compile for {name}: {done.stderr[-2000:]}")
    found, facts = read_program(program.read_text(), CHIPS[generation]), json.loads(Path(f"{program}.json").read_text())
    exposed = sum(each.wire_bytes * each.times for each in found.collectives if not each.hidden_cycles) / 1e9
    return replace(
        recorded, cycles=found.cycles, gigabytes=exposed, peak=facts["peak"] / 1e9, compile_seconds=facts["seconds"]
    )


def mfu(seconds: float, generation: str, chips: int) -> float:
    """Model FLOP/s over the peak."""
    return flops_per_token(MODEL, LENGTH) * TOKENS / (seconds * chips * CHIPS[generation].peak)


def main(benchmark: Benchmark) -> None:
    """Compiles, prints and writes."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    figures: list[dict] = []

    def figure(name: str, ours: float, peer: float, unit: str, target: float) -> None:
        met = ours <= target * peer
        figures.append(
            {"name": name, "ours": ours, "peer": peer, "unit": unit, "ratio": ours / peer, "target": target, "met": met}
        )

    columns = (
        "pod",
        "side",
        "step, s",
        "cycles",
        "attention, s",
        "exposed, s",
        "sent, GB",
        "HBM, GB",
        "compile, s",
        "MFU at most",
    )
    table = Table(*columns, title="15.5B, 4,194,304 tokens a step, estimated by the TPU compiler")
    for topology in benchmark.topologies:
        generation, chip, peer = topology.partition(":")[0], CHIPS[topology.partition(":")[0]], BEST[topology]
        if benchmark.run_maxtext is not None:
            peer = compile_maxtext(benchmark.run_maxtext, topology, peer, benchmark.plans.parent, console)
        config = CONFIGS[topology]()
        plan = planned(config, topology, 1, benchmark.plans, console)
        sent = sum(row["gigabytes"] for row in plan["collectives"])
        seconds = peer.seconds(generation)
        table.add_row(
            topology,
            "ours",
            f"{plan['step_seconds']:.2f}",
            f"{plan['cycles'] / 1e9:.2f}e9",
            f"{plan['kernel_seconds']:.2f}",
            f"{plan['exposed_seconds']:.2f}",
            f"{sent:.0f}",
            f"{plan['memory_peak'] / 1e9:.1f}",
            f"{plan['compile_seconds']:.0f}",
            f"{plan['mfu']:.1%}",
        )
        sending = peer.gigabytes * 1e9 / chip.interconnect
        table.add_row(
            "",
            f"MaxText: {peer.setting}",
            f"{seconds:.2f}",
            f"{peer.cycles / 1e9:.2f}e9",
            f"{seconds - peer.cycles / chip.clock - sending:.2f}",
            f"{sending:.2f}",
            f"{peer.gigabytes:.0f}",
            f"{peer.peak:.1f}",
            f"{peer.compile_seconds:.0f}",
            f"{mfu(seconds, generation, peer.chips):.1%}",
        )
        table.add_section()
        figure(f"{topology} step time", plan["step_seconds"], seconds, "s", 0.95)
        figure(f"{topology} compute cycles", plan["cycles"], peer.cycles, "cycles", 1.0)
        # Its gathers and all-reduces grow with its micro-batches.
        equal = peer.gigabytes / peer.micro_batches * config.optimizer.micro_batches
        figure(f"{topology} bytes at {config.optimizer.micro_batches} micro-batches", sent, equal, "GB", 0.6)
        figure(f"{topology} peak memory of capacity", plan["memory_peak"], chip.hbm, "bytes", 0.9)
        figure(f"{topology} compile time", plan["compile_seconds"], 300.0, "s", 1.0)
    console.print(table)

    if benchmark.scaling:
        curve = Table(
            "chips",
            "ours: step, s",
            "MFU at most",
            "MaxText: step, s",
            "MFU at most",
            "ratio",
            title="the same batch on more v5p",
        )
        ours, theirs = {}, {}
        for topology, slices in POD_MESHES:
            plan = planned(on_pod(topology, slices), topology, slices, benchmark.plans, console)
            chips, label = plan["chips"], f"{slices} x {plan['chips'] // slices}" if slices > 1 else str(plan["chips"])
            ours[label] = plan["mfu"]
            peer = BEST[topology] if topology in BEST else SCALING.get(topology) if slices == 1 else None
            row = [label, f"{plan['step_seconds']:.2f}", f"{plan['mfu']:.1%}"]
            if peer is not None:
                if benchmark.run_maxtext is not None:
                    peer = compile_maxtext(benchmark.run_maxtext, topology, peer, benchmark.plans.parent, console)
                seconds = peer.seconds("v5p")
                theirs[label] = mfu(seconds, "v5p", chips)
                row += [f"{seconds:.2f}", f"{theirs[label]:.1%}", f"{plan['step_seconds'] / seconds:.2f}"]
                figure(f"{label} v5p step time", plan["step_seconds"], seconds, "s", 1.0)
            curve.add_row(*row)
        console.print(curve)
        if benchmark.picture is not None:
            draw(ours, theirs, benchmark.picture)

    missed = [each["name"] for each in figures if not each["met"]]
    console.print(
        f"{len(figures) - len(missed)} of {len(figures)} targets met"
        + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(figures, indent=1) + "\n")


def draw(ours: dict[str, float], theirs: dict[str, float], path: Path) -> None:
    """MFU bounds by number of chips."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    places = {label: place for place, label in enumerate(ours)}
    axes.plot(list(places.values()), [100 * value for value in ours.values()], "o-", label="aurora-jax")
    axes.plot([places[label] for label in theirs], [100 * value for value in theirs.values()], "s--", label="MaxText")
    axes.set_xticks(list(places.values()), list(places))
    axes.set(
        xlabel="v5p chips",
        ylabel="MFU at most, %",
        title="StarCoderPlus, 4.19M tokens a step, 8,192 a sequence",
        ylim=(0, 100),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
