"""What being sure costs: checksums beside a save, the guard and goodput beside a step, a start with and without its
compiled programs.

    python benchmarks/reliability.py [--rounds 5] [--model starcoderbase-3b] [--json FILE]

The sides take turns, medians count. A save is `save_checkpoint` of bf16 parameters to the local disk, `sync` included;
its checksums are those that it computes. On a CPU NumPy sums them at the speed of its memory; what the program for a
TPU takes is its compiler's estimate for the whole state of StarCoderPlus on 256 v5e, beside the time in which the same
chips' hosts could read that state over PCIe at 16 GB/s a chip, a save's least. A step is that of
`configs/nano_aurora.py`, a start that run's, until its first step is done.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
STEPS = 10
PCIE = 16e9


@dataclass(frozen=True)
class Benchmark:
    """Prints the table."""

    rounds: int = 5
    model: str = "starcoderbase-3b"
    """Preset whose parameters are saved."""
    json: Path | None = None

    def run(self) -> None:
        rows = [*saving(self.model, self.rounds), *on_a_pod(), *stepping(self.rounds), *starting(self.rounds)]
        table = Table("", "ours", "peer", "ratio", "target", "met")
        for row in rows:
            values = (f"{row[name]:.4g} {row['unit']}" for name in ("ours", "peer"))
            table.add_row(row["name"], *values, f"{row['ratio']:.4f}", f"{row['target']}", str(row["met"]))
        Console(width=160).print(table)
        if self.json:
            self.json.write_text(json.dumps(rows, indent=1) + "\n")


def row(name: str, ours: float, peer: float, target: float, unit: str = "s") -> dict:
    return {
        "name": name,
        "ours": ours,
        "peer": peer,
        "unit": unit,
        "ratio": ours / peer,
        "target": target,
        "met": ours <= target * peer,
    }


def saving(preset: str, rounds: int) -> list[dict]:
    """Seconds of the checksums, and of the save that they are part of."""
    import jax
    import jax.numpy as jnp

    from aurora_jax.checkpoints import checksums
    from aurora_jax.checkpoints.metadata import CheckpointMetadata
    from aurora_jax.checkpoints.writing import save_checkpoint
    from aurora_jax.model.config import PRESETS
    from aurora_jax.model.sharding import nest, parameter_shapes

    model = PRESETS[preset]
    keys = iter(jax.random.split(jax.random.key(0), 100))
    parameters = nest(
        {
            path: jax.random.normal(next(keys), leaf.shape, jnp.bfloat16)
            for path, leaf in parameter_shapes(model).items()
        }
    )
    jax.block_until_ready(parameters)
    seconds: dict[str, list[float]] = {"checksums": [], "save": []}
    for _ in range(min(rounds, 3)):
        with tempfile.TemporaryDirectory(dir=ROOT) as folder:
            begun = time.perf_counter()
            save_checkpoint(Path(folder) / "c", parameters, CheckpointMetadata(model, "bfloat16"))
            os.sync()
            seconds["save"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        checksums.of_arrays(parameters)
        seconds["checksums"].append(time.perf_counter() - begun)
    ours, peer = (statistics.median(seconds[name]) for name in ("checksums", "save"))
    return [row(f"checksums / a save of {preset} in bf16, on this CPU", ours, peer, 0.01)]


def on_a_pod() -> list[dict]:
    """Seconds of the program of checksums, compiled for 256 v5e, and of reading the state out of them."""
    import jax

    from aurora_jax.checkpoints import checksums
    from aurora_jax.chips import CHIPS
    from aurora_jax.cli import load_config
    from aurora_jax.model.config import PRESETS
    from aurora_jax.model.mesh import make_mesh
    from aurora_jax.plan.estimate import bytes_a_chip
    from aurora_jax.plan.program import read_program
    from aurora_jax.plan.topology import tpu_topology
    from aurora_jax.train.program import Program

    config = load_config(ROOT / "configs" / "starcoderplus_v5e_256.py")
    program = Program(config, PRESETS["starcoderplus"], make_mesh(config.mesh, tpu_topology("v5e:16x16").devices))
    leaves = jax.tree.leaves(program.shapes)
    everywhere = jax.sharding.NamedSharding(program.mesh, jax.sharding.PartitionSpec())
    text = checksums._program(everywhere).lower(leaves).compile().as_text()
    seconds = read_program(text, CHIPS["v5e"]).cycles / CHIPS["v5e"].clock
    name = "checksums of StarCoderPlus's state on 256 v5e, compiled / reading it out"
    return [row(name, seconds, bytes_a_chip(program.shapes) / PCIE, 0.01)]


def stepping(rounds: int) -> list[dict]:
    """Seconds of a step with guard and goodput, and of one without."""
    import jax
    import numpy as np
    from aurora_jax.train.goodput import Goodput

    from aurora_jax.cli import load_config
    from aurora_jax.data.batches.loader import Batch
    from aurora_jax.model.config import ModelConfig
    from aurora_jax.model.mesh import make_mesh, place
    from aurora_jax.train.program import Program

    config = load_config(ROOT / "configs" / "nano_aurora.py")
    model = ModelConfig(4_096, 256, 256, 4, 4, 768)
    mesh = make_mesh(config.mesh)
    B, L = config.data.batch_size, config.data.sequence_length
    tokens = np.random.default_rng(0).integers(4_096, size=(B, L + 1)).astype(np.int32)
    positions = np.tile(np.arange(L, dtype=np.int32), (B, 1))
    batch = Batch(
        tokens[:, :-1], tokens[:, 1:], np.ones((B, L), np.float32), np.zeros((B, L), np.int32), positions,
        np.zeros(B, np.int32),
    )  # fmt: skip
    placed = place(mesh, batch)

    def side(spike_sigmas: float | None):
        program = Program(replace(config, optimizer=replace(config.optimizer, spike_sigmas=spike_sigmas)), model, mesh)
        state, _ = program.step(program.random_state(), placed)
        return [program, jax.block_until_ready(state)]

    sides = {"guarded": side(6.0), "plain": side(None)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder, Goodput(Path(folder)) as goodput:
        goodput.begin_steps(0)
        for _ in range(rounds * STEPS):
            for name, (program, state) in sides.items():
                begun = time.perf_counter()
                if name == "guarded":
                    with goodput.lost("waiting_for_data"):
                        pass
                state, metrics = program.step(state, placed)
                jax.block_until_ready(metrics)
                if name == "guarded":
                    goodput.step(1, counted=True)
                seconds[name].append(time.perf_counter() - begun)
                sides[name][1] = state
    ours, peer = (statistics.median(seconds[name]) for name in ("guarded", "plain"))
    return [row("a step with spike guard and goodput / without", ours, peer, 1.01)]


def starting(rounds: int) -> list[dict]:
    """Seconds from a start until its first step is done, with the programs of an earlier start and without."""
    corpus, run = ROOT / "quickstart", Path(tempfile.mkdtemp(dir=ROOT))
    if not (corpus / "corpus").is_dir():
        raise SystemExit("the corpus of `make quickstart` is wanted: run that first")
    command = [sys.executable, "-m", "aurora_jax", "train", str(ROOT / "configs" / "nano_base.py")]
    command += ["--data.corpus", str(corpus / "corpus"), "--data.stores", str(corpus / "stores")]
    command += ["--data.tokenizer", str(ROOT / "examples" / "nano"), "--output", str(run), "--evaluation.tasks"]
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    seconds: dict[str, list[float]] = {"kept": [], "anew": []}
    try:
        for number in range(min(rounds, 3)):
            for name in ("anew", "kept"):
                if name == "anew":
                    shutil.rmtree(run / "compiled", ignore_errors=True)
                (run / "goodput.json").unlink(missing_ok=True)
                steps = ["--stop-after", str(1 + 2 * number + (name == "kept"))]
                subprocess.run(command + steps, cwd=ROOT, env=environment, check=False, capture_output=True)
                lost = json.loads((run / "goodput.json").read_text())["seconds"]
                seconds[name].append(lost["start_up"] + lost["compiling"])
    finally:
        shutil.rmtree(run)
    ours, peer = (statistics.median(seconds[name]) for name in ("kept", "anew"))
    return [row("start-up and compiling of a nano run, with its compiled programs / without", ours, peer, 0.5)]


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
