"""Worker of convert_full_size.py: restores a checkpoint onto a mesh of this process' devices; prints what it
read and its peak memory.

python benchmarks/restore_shards.py CHECKPOINT '{"fsdp": 8}'
"""

import json
import re
import sys
import time
from pathlib import Path

import jax
from jax.sharding import NamedSharding

from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.checkpoints.format import read_metadata
from aurora_jax.model.mesh import make_mesh
from aurora_jax.model.sharding import flatten, nest, rows_of
from aurora_jax.train.config import MeshConfig


def figure(file: str, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/self/{file}").read_text())
    assert found is not None
    return int(found[1])


def main(checkpoint: Path, mesh: dict[str, int]) -> None:
    rows = rows_of(read_metadata(checkpoint).config)
    devices = make_mesh(MeshConfig(**mesh))
    shardings = nest({path: NamedSharding(devices, row.partition) for path, row in rows.items()})
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    memory, read, start = figure("status", "VmRSS"), figure("io", "rchar"), time.perf_counter()
    parameters = jax.block_until_ready(restore_parameters(checkpoint, shardings=shardings))
    seconds = time.perf_counter() - start
    arrays = sum(shard.data.nbytes for leaf in flatten(parameters).values() for shard in leaf.addressable_shards)
    whole = sum(leaf.nbytes for leaf in flatten(parameters).values())
    beyond = (figure("status", "VmHWM") - memory) * 1024 - arrays
    print(json.dumps({"read": figure("io", "rchar") - read, "parameters": whole, "beyond": beyond, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
