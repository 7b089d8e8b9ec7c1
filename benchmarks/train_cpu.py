"""Tokens per second of a training step on CPU: ours against transformers and PyTorch, the same model, batch, optimizer
and threads.

    python benchmarks/train_cpu.py [--rounds 5] [--json FILE]

The shape is that of `configs/nano_aurora.py`. Each measurement is a process of its own, the sides take turns, and the
median counts. PyTorch runs as transformers comes (eager, scaled-dot-product attention) and under `torch.compile` in its
default mode (which needs a C++ compiler), with fused AdamW and gradient clipping, in fp32 and under bf16 autocast; we
run in fp32 and with bf16 products, sums in fp32. All have fp32 parameters and moments, and as many threads as there are
cores. Compilation, ours and PyTorch's, is in the first steps, which are not counted.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, POSITIONS, WIDTH, LAYERS, HEADS, MLP = 4_096, 256, 256, 4, 4, 768
BATCH = 32
WARMUP_STEPS, STEPS = 3, 10
TARGET = 2.0


def tokens_BL(seed: int = 0):
    """Random tokens [B, L + 1]; their values do not matter for speed."""
    import numpy as np

    return np.random.default_rng(seed).integers(VOCABULARY, size=(BATCH, POSITIONS + 1)).astype(np.int32)


def measure(step: Callable[[], None]) -> float:
    """Median seconds of a step."""
    seconds = []
    for number in range(WARMUP_STEPS + STEPS):
        begun = time.perf_counter()
        step()
        if number >= WARMUP_STEPS:
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def ours(precision: str) -> float:
    """Seconds of our step, as `aurora train configs/nano_aurora.py` runs it."""
    sys.path.insert(0, str(ROOT))
    import jax
    import numpy as np

    from aurora_jax.data.batches.loader import Batch
    from aurora_jax.model.config import ModelConfig
    from aurora_jax.model.mesh import make_mesh, place
    from aurora_jax.train.program import Program
    from configs.nano_aurora import config as nano_aurora

    config = nano_aurora()
    compute = config.compute.__class__(compute_dtype=precision, activation_dtype="float32", unroll_layers=True)
    model = ModelConfig(VOCABULARY, POSITIONS, WIDTH, LAYERS, HEADS, MLP).with_dropout(0.0)
    program = Program(replace(config, compute=compute), model, make_mesh(config.mesh))
    state = program.random_state()
    tokens = tokens_BL()
    ones = np.ones((BATCH, POSITIONS), np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, ones, np.zeros(BATCH, np.int32))
    batch = place(program.mesh, batch)

    def step() -> None:
        nonlocal state
        state, metrics = program.step(state, batch)
        jax.block_until_ready((state, metrics))

    return measure(step)


def roofline(precision: str) -> float:
    """Seconds of our step if it were nothing but its matrix products, all as fast as the widest of them is alone."""
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp

    from aurora_jax.model.config import ModelConfig
    from aurora_jax.model.flops import flops_per_token

    model = ModelConfig(VOCABULARY, POSITIONS, WIDTH, LAYERS, HEADS, MLP)
    left, right = (jnp.ones(shape, precision) for shape in ((BATCH * POSITIONS, WIDTH), (WIDTH, MLP)))
    product = jax.jit(lambda left, right: jnp.matmul(left, right, preferred_element_type=jnp.float32))
    seconds = measure(lambda: jax.block_until_ready(product(left, right)))
    return flops_per_token(model, POSITIONS) * BATCH * POSITIONS / (2 * left.size * MLP / seconds)


def eager(precision: str) -> float:
    """Seconds of a step of transformers' GPTBigCodeForCausalLM in PyTorch."""
    return pytorch(precision, compiled=False)


def compiled(precision: str) -> float:
    """The same under `torch.compile`."""
    return pytorch(precision, compiled=True)


def pytorch(precision: str, *, compiled: bool) -> float:
    import torch
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=MLP,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model = GPTBigCodeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.tensor(tokens_BL()[:, :-1], dtype=torch.long)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return measure(step)


@dataclass(frozen=True)
class Benchmark:
    """Our training step against transformers + PyTorch on this CPU, eager and compiled."""

    rounds: int = 5
    """Processes a side and precision."""
    json: Path | None = None
    """Also write the rows to this file: [{name, ours, peer, unit, ratio, target, met}]."""


SIDES = {"ours": ours, "PyTorch": eager, "torch.compile": compiled, "roofline": roofline}
PAIRS = {
    "fp32, both": ("float32", "float32"),
    "bf16 products, both": ("bfloat16", "bfloat16"),
    "as each comes: our config (bf16 products) / transformers' default (fp32)": ("bfloat16", "float32"),
}
"""Our precision and the peers'."""


def main(benchmark: Benchmark) -> None:
    rates: dict[tuple[str, str], list[float]] = {}
    for number in range(benchmark.rounds):
        for precision in ("float32", "bfloat16"):
            for side in SIDES:
                command = [sys.executable, __file__, "--measure", side, precision]
                environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TRANSFORMERS_VERBOSITY": "error"}
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True).stdout
                seconds = float(output.splitlines()[-1])
                rates.setdefault((side, precision), []).append(BATCH * POSITIONS / seconds)
                rate = rates[side, precision][-1]
                print(f"round {number + 1}/{benchmark.rounds} {side} {precision}: {rate:,.0f} tokens/s", flush=True)

    middle = {key: statistics.median(found) for key, found in rates.items()}
    rows = []
    table = Table(
        "training step on CPU, tokens/s", "ours", "PyTorch", "ratio", "torch.compile", "ratio", f"target {TARGET}"
    )
    for name, (our_precision, peer_precision) in PAIRS.items():
        mine, cells = middle["ours", our_precision], []
        for side in ("PyTorch", "torch.compile"):
            theirs = middle[side, peer_precision]
            ratio, met = mine / theirs, mine / theirs >= TARGET
            row = {"name": f"{name}; {side}", "ours": mine, "peer": theirs, "unit": "tokens/s"}
            rows.append({**row, "ratio": ratio, "target": TARGET, "met": met})
            cells += [f"{theirs:,.0f}", f"{ratio:.2f}"]
        met = all(row["met"] for row in rows[-2:])
        table.add_row(name, f"{mine:,.0f}", *cells, "met" if met else "missed")
    console = Console()
    console.print(table)
    for precision in ("float32", "bfloat16"):
        mine, bound = middle["ours", precision], middle["roofline", precision]
        console.print(
            f"{precision}: {mine / bound:.0%} of our own roofline, {bound:,.0f} tokens/s with nothing but "
            "matrix products"
        )
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(SIDES[sys.argv[2]](sys.argv[3]))
    else:
        main(tyro.cli(Benchmark, description=__doc__))
