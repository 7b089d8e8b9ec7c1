"""Tokens per second of greedy generation on CPU: ours against `transformers.generate` with its cache, the
same model and threads.

    python benchmarks/generate_cpu.py [--rounds 3] [--json FILE]

Two models: the shape of `configs/nano_aurora.py` (3.4M parameters, with 512 positions) and
`tiny_starcoder_py` (164M). Prompts of 64 random
tokens are continued by 256, the prompt's reading included, compiling and one warming call not. A measurement
is the median of three calls in a process, the two sides take turns, and the median of the rounds counts. A
round takes about 12 minutes.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("nano", "tiny_starcoder_py")
BATCHES = (1, 16)
PROMPT, NEW_TOKENS = 64, 256
TARGET = 2.0
PAIRS = {
    "fp32, both": ("float32", "float32"),
    "bf16, both": ("bfloat16", "bfloat16"),
    "ours in bf16, as checkpoints are released / transformers' fp32": ("bfloat16", "float32"),
}


def model_config(name: str):
    from dataclasses import replace

    from aurora_jax.model.config import PRESETS
    from configs.nano_base import config as nano_base

    nano = nano_base().model
    assert nano is not None
    return replace(nano, max_positions=512) if name == "nano" else PRESETS[name]


def prompts(vocabulary_size: int, batch: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(1, vocabulary_size, (batch, PROMPT)).tolist()


def measure(generate: Callable[[], None]) -> float:
    """Seconds of a call after the first: the median of three."""
    generate()
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        generate()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def ours(name: str, batch: int, precision: str) -> float:
    """Seconds of a call of `Generator`, as `aurora generate` makes it for a file."""
    import jax

    from aurora_jax.generate.generator import Generator
    from aurora_jax.model.config import ComputeConfig
    from aurora_jax.model.decoder import initial_parameters

    config = model_config(name)
    parameters = jax.tree.map(lambda array: array.astype(precision), initial_parameters(config, 0))
    generator = Generator(config, parameters, ComputeConfig(precision, precision))  # type: ignore[arg-type]
    rows = prompts(config.vocabulary_size, batch)
    return measure(lambda: generator(rows, NEW_TOKENS) and None)


def peer(name: str, batch: int, precision: str) -> float:
    """Seconds of a call of `transformers.generate`."""
    import torch
    import transformers

    from aurora_jax.model.config import to_hf_config

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    config = model_config(name)
    hf = transformers.AutoConfig.for_model(**to_hf_config(config))
    model = transformers.AutoModelForCausalLM.from_config(hf, dtype=getattr(torch, precision)).eval()
    model.generation_config.eos_token_id = None
    tokens = torch.tensor(prompts(config.vocabulary_size, batch))
    mask = torch.ones_like(tokens)

    def generate() -> None:
        with torch.inference_mode():
            made = model.generate(
                tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
            )
        assert made.shape == (batch, PROMPT + NEW_TOKENS)

    return measure(generate)


@dataclass(frozen=True)
class Benchmark:
    """Our generation against `transformers.generate` on this CPU."""

    rounds: int = 3
    """Processes a side, model, batch and precision."""
    json: Path | None = None
    """Also write the rows to this file: [{name, ours, peer, unit, ratio, target, met}]."""


def main(benchmark: Benchmark) -> None:
    rates: dict[tuple[str, str, int, str], list[float]] = {}
    for number in range(benchmark.rounds):
        for model in MODELS:
            for batch in BATCHES:
                for precision in ("float32", "bfloat16"):
                    for side in ("ours", "peer"):
                        command = [sys.executable, __file__, "--measure", side, model, str(batch), precision]
                        environment = {
                            **os.environ,
                            "JAX_PLATFORMS": "cpu",
                            "TRANSFORMERS_VERBOSITY": "error",
                            "PYTHONPATH": str(ROOT),
                        }
                        output = subprocess.run(
                            command, check=True, stdout=subprocess.PIPE, env=environment, text=True
                        ).stdout
                        rate = batch * NEW_TOKENS / float(output.splitlines()[-1])
                        rates.setdefault((side, model, batch, precision), []).append(rate)
                        label = f"round {number + 1}/{benchmark.rounds} {side} {model} batch {batch} {precision}"
                        print(f"{label}: {rate:,.1f} tokens/s", flush=True)

    rows = []
    for model in MODELS:
        for batch in BATCHES:
            for pair, (our_precision, peer_precision) in PAIRS.items():
                mine = statistics.median(rates["ours", model, batch, our_precision])
                theirs = statistics.median(rates["peer", model, batch, peer_precision])
                ratio = mine / theirs
                name = f"{model}, batch {batch}, {pair}"
                figures = {
                    "ours": mine,
                    "peer": theirs,
                    "unit": "tokens/s",
                    "ratio": ratio,
                    "target": TARGET,
                    "met": ratio >= TARGET,
                }
                rows.append({"name": name, **figures})
    table = Table("256 new tokens on CPU", "ours, tokens/s", "transformers, tokens/s", "ratio", f"target {TARGET}")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['ours']:,.1f}",
            f"{row['peer']:,.1f}",
            f"{row['ratio']:.2f}",
            "met" if row["met"] else "missed",
        )
    Console(width=140).print(table)
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print({"ours": ours, "peer": peer}[sys.argv[2]](sys.argv[3], int(sys.argv[4]), sys.argv[5]))
    else:
        main(tyro.cli(Benchmark, description=__doc__))
