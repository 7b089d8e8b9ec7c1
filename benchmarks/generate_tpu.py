"""What a token of StarCoderPlus costs on TPUs: the decoding loop of `aurora generate`, compiled for eight
chips without having them.

    python benchmarks/generate_tpu.py [--json FILE]

Bytes that a chip reads from HBM for a token of every row, against the bytes of its weights, which decoding
one token at a time cannot do without (the learned positions excepted: one row of them is read). A cache of
2,047 tokens, bf16. About 5 minutes.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from aurora_jax.model.config import PRESETS
from aurora_jax.plan.decoding import plan_decoding

TOPOLOGIES, BATCHES = ("v5e:2x4", "v6e:2x4"), (2, 16)
PROMPT_SLOTS, NEW_TOKENS = 1_792, 256
TARGET = 1.1


@dataclass(frozen=True)
class Benchmark:
    """The decoding step of StarCoderPlus on eight chips."""

    json: Path | None = None
    """Also write the rows to this file: [{name, ours, peer, unit, ratio, target, met}]."""


def main(benchmark: Benchmark) -> None:
    rows = []
    table = Table(
        "eight chips, tensor 8",
        "batch",
        "read, GB",
        "weights, GB",
        "ratio",
        f"target {TARGET}",
        "cycles",
        "at least, ms",
        "peak, GB",
    )
    for topology in TOPOLOGIES:
        for batch in BATCHES:
            plan = plan_decoding(
                PRESETS["starcoderplus"], topology, batch_size=batch, prompt_slots=PROMPT_SLOTS, new_tokens=NEW_TOKENS
            )
            ratio = plan.read_bytes / plan.weight_bytes
            rows.append(
                {
                    "name": f"bytes a chip reads a token, {topology}, batch {batch}",
                    "ours": plan.read_bytes / 1e9,
                    "peer": plan.weight_bytes / 1e9,
                    "unit": "GB",
                    "ratio": ratio,
                    "target": TARGET,
                    "met": ratio <= TARGET,
                }
            )
            figures = (
                f"{plan.read_bytes / 1e9:.3f}",
                f"{plan.weight_bytes / 1e9:.3f}",
                f"{ratio:.2f}",
                "met" if ratio <= TARGET else "missed",
            )
            table.add_row(
                topology,
                str(batch),
                *figures,
                f"{plan.cycles / 1e6:.2f}M",
                f"{plan.seconds * 1e3:.2f}",
                f"{plan.peak_bytes / 1e9:.2f}",
            )
    Console(width=140).print(table)
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
