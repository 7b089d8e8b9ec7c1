"""Peak memory of conversion: does it grow with the model?

    python benchmarks/convert_memory.py --workdir /tmp --json convert_memory.json

Makes checkpoints of the shapes of starcoderbase-1b and -3b (fp32, sharded), converts each in a process of its own in both directions, and
reads that process's peak resident memory from the kernel. Expected: each below 2 GB, and the two models equal within 20 %. About 4 minutes
and 25 GB of disk.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from aurora_jax.model.config import PRESETS, to_hf_config
from aurora_jax.model.sharding import parameter_count
from convert.to_torch import plan_shards
from convert.weight_map import hf_tensors

MODELS = ("starcoderbase-1b", "starcoderbase-3b")
LIMIT_MB = 2000.0
SPREAD = 1.2


@dataclass(frozen=True)
class Arguments:
    """Measure the peak memory of conversion on synthetic checkpoints of two sizes."""

    workdir: Path = Path(tempfile.gettempdir())
    """Where the checkpoints are made; 30 GB are needed for a while."""
    json: Path | None = None
    """Write the figures to this file."""


def main(arguments: Arguments) -> int:
    rows = []
    peaks: dict[str, list[float]] = {}
    for model in MODELS:
        with tempfile.TemporaryDirectory(dir=arguments.workdir, prefix="convert_memory_") as folder:
            source, ours, back = (Path(folder) / name for name in ("source", "ours", "back"))
            make_checkpoint(source, model)
            for direction, command in (("from-torch", (source, ours)), ("to-torch", (ours, back))):
                megabytes, seconds = peak_megabytes(direction, *command)
                peaks.setdefault(direction, []).append(megabytes)
                whole = parameter_count(PRESETS[model]) * 4 / 1e6
                name = f"{direction} {model}, peak memory ({seconds:.0f} s)"
                rows.append(figure(name, megabytes, whole, f"< {LIMIT_MB:.0f} MB", megabytes < LIMIT_MB))
                if direction == "from-torch":
                    shutil.rmtree(source)
    for direction, (small, large) in peaks.items():
        met = 1 / SPREAD <= large / small <= SPREAD
        rows.append(figure(f"{direction}, peak of 3B against 1B", large, small, f"within {SPREAD - 1:.0%}", met))
    table = Table(
        "measurement", "ours", "peer", "ratio", "target", "met", caption="peer: the weights' own size; in the last two rows, the 1B model"
    )
    for row in rows:
        cells = (row["name"], f"{row['ours']:,.0f} {row['unit']}", f"{row['peer']:,.0f} {row['unit']}", f"{row['ratio']:.3f}")
        table.add_row(*map(str, cells), str(row["target"]), "yes" if row["met"] else "NO")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


def figure(name: str, ours: float, peer: float, target: str, met: bool) -> dict[str, Any]:
    return {"name": name, "ours": ours, "peer": peer, "unit": "MB", "ratio": ours / peer, "target": target, "met": met}


def make_checkpoint(folder: Path, model: str) -> None:
    """A Hugging Face folder of a model's shape: sparse files (zeros take no disk), with random LayerNorms and biases."""
    folder.mkdir()
    config = PRESETS[model]
    tensors = hf_tensors(config)
    random = np.random.default_rng(0)
    shards = plan_shards(config, itemsize=4, limit=5 * 10**9)
    for shard in shards:
        header: dict[str, dict[str, Any]] = {}
        end = 0
        for tensor in shard.tensors:
            shape = tensors[tensor][0][0].hf_shape(config)
            begin, end = end, end + math.prod(shape) * 4
            header[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        with (folder / shard.name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + end)
            for entry in header.values():
                if len(entry["shape"]) == 1:
                    file.seek(8 + len(encoded) + entry["data_offsets"][0])
                    file.write(random.normal(size=entry["shape"]).astype(np.float32).tobytes())
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    index = {"weight_map": {tensor: shard.name for shard in shards for tensor in shard.tensors}}
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peak_megabytes(direction: str, source: Path, destination: Path) -> tuple[float, float]:
    """Peak resident memory (10^6 bytes) and seconds of `python -m convert` in a process of its own."""
    start = time.perf_counter()
    repository = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "convert", direction, str(source), str(destination)]
    process = subprocess.Popen(command, cwd=repository)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes * 1024 / 1e6, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
