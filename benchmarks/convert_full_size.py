"""Conversion and restoring at the real size: memory of a 15.5B checkpoint, time of a 3B one against `cp`,
what a mesh reads of it.

    python benchmarks/convert_full_size.py --workdir /tmp --json convert_full_size.json

size      a checkpoint of starcoderplus' shape in the layout of the hub (15,517,456,384 parameters, 14 fp32 shards;
          sparse files, in which vectors and some rows of each matrix are random) becomes a bf16 checkpoint of ours
          and comes back, and is compared, every tensor bit by bit. Peak memory is the kernel's, of each
          conversion's whole process: below 3 GB.
speed     3B, random bf16 numbers: `from-torch` and `to-torch` against `cp` of the same bytes on the same disk, in
          turns. Every time starts with a cold source (its pages are evicted) and ends when all is on the disk
          (`sync`). At least 0.4 times as fast as `cp`.
restore   that checkpoint onto eight CPU devices, fsdp 8 and fsdp 4 x tensor 2: bytes that the process reads,
          against those of the parameters, and its peak memory beyond them, against the largest parameter.

35 GB of disk; about 20 minutes.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from aurora_jax.model.config import PRESETS, to_hf_config
from aurora_jax.model.sharding import parameter_count, parameter_shapes
from convert.source import SAFETENSORS_DTYPES, read_folder
from convert.to_torch import plan_shards
from convert.weight_map import hf_tensors

FULL, SMALL = "starcoderplus", "starcoderbase-3b"
PARAMETERS, SHARDS = 15_517_456_384, 14
MEMORY_GB = 3.0
SPEED = 0.4
READ = 1.05
MESHES: tuple[dict[str, int], ...] = ({"fsdp": 8}, {"fsdp": 4, "tensor": 2})
REPOSITORY = Path(__file__).resolve().parent.parent
COMPARED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Arguments:
    """Measure conversion at 15.5B parameters, its speed at 3B, and restoring onto a mesh."""

    workdir: Path = Path(tempfile.gettempdir())
    """Where the checkpoints are made; 35 GB are needed for a while."""
    parts: tuple[Literal["size", "speed", "restore"], ...] = ("size", "speed", "restore")
    """What to measure."""
    rounds: int = 3
    """Times that each side is timed; the medians count."""
    json: Path | None = None
    """Write the figures to this file."""


def main(arguments: Arguments) -> int:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.workdir, prefix="convert_full_size_") as folder:
        if "size" in arguments.parts:
            rows += size(Path(folder))
        if {"speed", "restore"} & {*arguments.parts}:
            source, ours = Path(folder) / "3b", Path(folder) / "3b_ours"
            make_checkpoint(source, SMALL, "BF16")
            if "speed" in arguments.parts:
                rows += speed(source, ours, Path(folder), arguments.rounds)
            else:
                convert("from-torch", source, ours)
            if "restore" in arguments.parts:
                rows += restore(ours)
    table = Table("measurement", "ours", "peer", "ratio", "target", "met", title="conversion at full size")
    for row in rows:
        cells = (
            row["name"],
            f"{row['ours']:,.2f} {row['unit']}",
            f"{row['peer']:,.2f} {row['unit']}",
            f"{row['ratio']:.3f}",
        )
        table.add_row(*cells, row["target"], "yes" if row["met"] else "NO")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


def figure(
    name: str, ours: float, peer: float, unit: str, target: str, met: bool, ratio: float | None = None
) -> dict[str, Any]:
    ratio = ours / peer if ratio is None else ratio
    return {"name": name, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "target": target, "met": met}


# ---------------------------------------------------------------- size: peak memory at 15.5B


def size(folder: Path) -> list[dict[str, Any]]:
    source, ours, back = (folder / f"15b{name}" for name in ("", "_ours", "_back"))
    make_checkpoint(source, FULL, "F32")
    opened = read_folder(source)
    assert (
        sum(math.prod(tensor.shape) for tensor in opened.tensors.values())
        == parameter_count(PRESETS[FULL])
        == PARAMETERS
    )
    assert [file.name for file in opened.files] == [
        f"model-{n:05d}-of-{SHARDS:05d}.safetensors" for n in range(1, SHARDS + 1)
    ]
    rows = []
    gigabytes = PARAMETERS * 2 / 1e9
    for direction, start, end, options in (
        ("from-torch", source, ours, ("--dtype", "bfloat16")),
        ("to-torch", ours, back, ()),
    ):
        peak, seconds = convert(direction, start, end, *options)
        name = f"{direction} {FULL} ({PARAMETERS:,} parameters, {seconds:.0f} s), peak memory / bf16 weights"
        rows.append(figure(name, peak, gigabytes, "GB", f"< {MEMORY_GB:g} GB", peak < MEMORY_GB))
    equal = count_equal(source, back)
    tensors = len(opened.tensors)
    rows.append(
        figure(
            "tensors that came back bit-equal (fp32 rounded to bf16) / all", equal, tensors, "", "all", equal == tensors
        )
    )
    for path in (source, ours, back):
        shutil.rmtree(path)
    return rows


def make_checkpoint(folder: Path, model: str, dtype: Literal["F32", "BF16"]) -> None:
    """A Hugging Face folder of a model's shape: all random in bf16; in fp32 sparse, with random vectors and
    some random rows."""
    folder.mkdir()
    config = PRESETS[model]
    tensors = hf_tensors(config)
    itemsize = SAFETENSORS_DTYPES[dtype].itemsize
    random = np.random.default_rng(0)
    shards = plan_shards(config, itemsize, limit=5 * 10**9)
    for shard in shards:
        header: dict[str, dict[str, Any]] = {}
        end = 0
        for tensor in shard.tensors:
            shape = tensors[tensor][0][0].hf_shape(config)
            begin, end = end, end + math.prod(shape) * itemsize
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        data = 8 + len(encoded)
        with (folder / shard.name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            if dtype == "BF16":
                for first in range(0, end, COMPARED_BYTES):
                    file.write(random.bytes(min(COMPARED_BYTES, end - first)))
                continue
            file.truncate(data + end)
            for entry in header.values():
                rows, columns = (1, entry["shape"][0]) if len(entry["shape"]) == 1 else entry["shape"]
                for row in random.integers(rows, size=4):
                    file.seek(data + entry["data_offsets"][0] + int(row) * columns * itemsize)
                    file.write(random.normal(size=columns).astype(np.float32).tobytes())
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    index = {"weight_map": {tensor: shard.name for shard in shards for tensor in shard.tensors}}
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def count_equal(source: Path, back: Path) -> int:
    """Tensors of the source, rounded to bf16, that came back bit-equal."""
    theirs, found = read_folder(source).tensors, read_folder(back).tensors
    assert {*theirs} == {*found}

    def blocks(name: str) -> Iterator[bool]:
        tensor = theirs[name]
        step = max(1, COMPARED_BYTES // (tensor.nbytes // tensor.shape[0]))
        for first in range(0, tensor.shape[0], step):
            span = [(first, min(first + step, tensor.shape[0]))]
            expected = tensor.read_rows(span).astype(ml_dtypes.bfloat16, copy=False)
            yield np.array_equal(expected.view(np.uint16), found[name].read_rows(span).view(np.uint16))

    return sum(all(blocks(name)) for name in theirs)


def convert(direction: str, source: Path, destination: Path, *options: str) -> tuple[float, float]:
    """Peak resident memory (10^9 bytes) and seconds of `python -m convert` in a process of its own."""
    return run([sys.executable, "-m", "convert", direction, str(source), str(destination), *options])


def run(command: list[str]) -> tuple[float, float]:
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPOSITORY)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    os.sync()
    kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes * 1024 / 1e9, time.perf_counter() - start


# ---------------------------------------------------------------- speed: against cp at 3B


def speed(source: Path, ours: Path, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Leaves the checkpoint at `ours`."""
    copy, back = folder / "3b_copy", folder / "3b_back"
    peaks: dict[str, float] = {}
    seconds: dict[str, list[float]] = {"cp": [], "from-torch": [], "to-torch": []}
    for _ in range(rounds):
        for direction, start, end in (("from-torch", source, ours), ("to-torch", ours, back)):
            for side in ("cp", direction):
                read, written = (source, copy) if side == "cp" else (start, end)
                shutil.rmtree(written, ignore_errors=True)
                evict(read)
                peak, elapsed = (
                    run(["cp", "-r", str(read), str(written)]) if side == "cp" else convert(side, read, written)
                )
                seconds[side].append(elapsed)
                peaks[side] = max(peak, peaks.get(side, 0.0))
                print(f"{side}: {elapsed:.1f} s", file=sys.stderr)
            shutil.rmtree(copy)
    equal, tensors = count_equal(source, back), len(read_folder(source).tensors)
    shutil.rmtree(back)
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    gigabytes = parameter_count(PRESETS[SMALL]) * 2 / 1e9
    rows = []
    for side in ("from-torch", "to-torch"):
        ratio = medians["cp"] / medians[side]
        name = f"{side} {SMALL}, {gigabytes:.1f} GB of random bf16 / cp (ratio: of speeds)"
        rows.append(figure(name, medians[side], medians["cp"], "s", f">= {SPEED:g}", ratio >= SPEED, ratio))
        name = f"{side} {SMALL}, peak memory / bf16 weights"
        rows.append(figure(name, peaks[side], gigabytes, "GB", f"< {MEMORY_GB:g} GB", peaks[side] < MEMORY_GB))
    rows.append(figure("tensors that came back bit-equal / all", equal, tensors, "", "all", equal == tensors))
    return rows


def evict(folder: Path) -> None:
    """Drops a folder's files from the page cache, once they are on the disk."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------- restore: eight devices


def restore(ours: Path) -> list[dict[str, Any]]:
    largest = max(math.prod(shape.shape) for shape in parameter_shapes(PRESETS[SMALL]).values()) * 2 / 1e9
    rows = []
    for mesh in MESHES:
        worker = Path(__file__).with_name("restore_shards.py")
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(worker), str(ours), json.dumps(mesh)]
        found = json.loads(
            subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, check=True).stdout
        )
        label = " x ".join(f"{axis} {devices}" for axis, devices in mesh.items())
        read, parameters, beyond = (found[key] / 1e9 for key in ("read", "parameters", "beyond"))
        name = f"restore onto {label} ({found['seconds']:.0f} s), bytes read / parameters"
        rows.append(figure(name, read, parameters, "GB", f"<= {READ:g}", read <= READ * parameters))
        name = f"restore onto {label}, peak memory beyond the arrays / largest parameter"
        rows.append(figure(name, beyond, largest, "GB", "< 1", beyond < largest))
    return rows


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
