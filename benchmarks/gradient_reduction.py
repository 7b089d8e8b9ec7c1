"""What it costs to add up gradients in bf16: the error of reduce-scatters over 8, 64 and 256 shards, simulated.

    python benchmarks/gradient_reduction.py [--json FILE]

On a mesh each device has the gradient of its own rows, already rounded to bf16 where the products round (`einsum` in
`aurora_jax/model/product.py` gives gradients the dtype of the weights that were gathered). A reduce-scatter adds them
up. Four ways are compared, on gradients of the small base (examples/nano) of this repository's own text, one row of
128 tokens a shard:

    fp32 sums    of gradients that were rounded to bf16 once
    bf16 ring    around the ring of an axis: every partial sum is rounded to bf16 where it is sent on
    bf16 rings   around a ring of 16, and the sums around another one: as the meshes of the pod configs do
    bf16 tree    pairs, pairs of pairs, ...: each of the log2(shards) levels rounds

The error is that of the sum against fp64 sums of unrounded fp32 gradients, relative to its norm. Beside it stands what
a batch's own noise is: how far the gradients of its two halves lie from each other, halved.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import aurora_jax as aurora
from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.data.batches.loader import Batch
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.decoder import structure_of
from aurora_jax.model.likelihood import make_loss
from aurora_jax.model.sharding import flatten

ROOT = Path(__file__).resolve().parents[1]
SHARDS, LENGTH = (8, 64, 256), 128
INNER = 16
TARGET = 0.1
"""Of the batch's own noise, at most."""


def rows_of(model, count: int) -> np.ndarray:
    """Rows of tokens of this repository's documentation and code."""
    files = [*sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("aurora_jax/**/*.py"))]
    text = "\n".join(file.read_text() for file in files)[: count * LENGTH * 8]
    ids = np.asarray(model.tokenizer.encode(text), np.int32)
    rows = ids[: count * LENGTH].reshape(-1, LENGTH)
    assert len(rows) == count, len(rows)
    return np.random.default_rng(0).permutation(rows)


class Sums:
    """Gradients as they come, added up in each way."""

    def __init__(self) -> None:
        self.exact, self.fp32, self.ring, self.count = 0.0, 0.0, None, 0
        self.tree: list[tuple[int, np.ndarray]] = []
        self.inner, self.outer = None, None

    def add(self, gradient: np.ndarray) -> None:
        rounded = gradient.astype(ml_dtypes.bfloat16)
        self.count += 1
        self.exact = self.exact + gradient.astype(np.float64)
        self.fp32 = self.fp32 + rounded.astype(np.float32)
        self.ring = rounded if self.ring is None else added(self.ring, rounded)
        self.inner = rounded if self.inner is None else added(self.inner, rounded)
        if self.count % INNER == 0:
            self.outer, self.inner = self.inner if self.outer is None else added(self.outer, self.inner), None
        level = 0
        while self.tree and self.tree[-1][0] == level:
            rounded = added(self.tree.pop()[1], rounded)
            level += 1
        self.tree.append((level, rounded))

    def errors(self) -> dict[str, float]:
        rings = self.inner if self.outer is None else self.outer
        ways = {"fp32 sums": self.fp32, "bf16 ring": self.ring, "bf16 rings": rings, "bf16 tree": self.tree[0][1]}
        norm = np.linalg.norm(self.exact)
        return {name: float(np.linalg.norm(way.astype(np.float64) - self.exact) / norm) for name, way in ways.items()}


def added(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """In fp32, rounded to bf16."""
    return (one.astype(np.float32) + other.astype(np.float32)).astype(ml_dtypes.bfloat16)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = aurora.load(ROOT / "examples" / "nano", checkpoint=Path(folder) / "nano")
        parameters = restore_parameters(model.checkpoint, dtype=jnp.float32)
        rows = rows_of(model, max(SHARDS))
    compute = ComputeConfig("bfloat16", "bfloat16")
    loss = make_loss(structure_of(model.config, compute), compute, z_loss=0.0, isolate_documents=False)

    @jax.jit
    def gradient(parameters, row_L):
        ones = jnp.ones((1, LENGTH), jnp.float32)
        batch = Batch(
            tokens_BL=row_L[None],
            targets_BL=jnp.roll(row_L[None], -1, axis=1),
            segment_ids_BL=jnp.ones((1, LENGTH), jnp.int32),
            positions_BL=jnp.arange(LENGTH, dtype=jnp.int32)[None],
            loss_weights_BL=ones.at[:, -1].set(0.0),
            task_ids_B=jnp.zeros(1, jnp.int32),
        )
        return jax.grad(lambda p: loss(p, batch, jnp.float32(LENGTH - 1), None)[0])(parameters)

    columns = ("fp32 sums", "bf16 ring", "bf16 rings", "bf16 tree", "noise")
    print(f"{'shards':>6}" + "".join(f"{column:>12}" for column in columns))
    results, sums, halves = [], Sums(), [0.0, 0.0]
    for number, row in enumerate(rows, start=1):
        tree = flatten(gradient(parameters, row))
        flat = np.concatenate([np.ravel(np.asarray(leaf)) for leaf in tree.values()]) / max(SHARDS)
        sums.add(flat)
        halves[number % 2] = halves[number % 2] + flat.astype(np.float64)
        if number in SHARDS:
            noise = float(np.linalg.norm(halves[0] - halves[1]) / np.linalg.norm(sums.exact))
            errors = sums.errors()
            print(f"{number:>6}" + "".join(f"{error:>12.2%}" for error in (*errors.values(), noise)))
            for name, error in errors.items():
                ratio = error / noise
                results.append(
                    {
                        "name": f"{name}, {number} shards, of the batch's noise",
                        "ours": error,
                        "peer": noise,
                        "unit": "relative error",
                        "ratio": ratio,
                        "target": TARGET,
                        "met": ratio <= TARGET,
                    }
                )
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
