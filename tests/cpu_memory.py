"""Worker of test_plan_on_cpu.py: compiles a training step for the CPU, runs it, prints estimated and measured
bytes above its arguments.

python tests/cpu_memory.py full
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.mesh import make_mesh
from aurora_jax.train.config import DataConfig, MeshConfig, TrainConfig
from aurora_jax.train.program import Program
from aurora_jax.train.stages import LearningRate, Stage

MODEL = ModelConfig(512, 1024, 256, 6, 4, 1024).with_dropout(0.0)
B, L = 8, 1024


def resident(name: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS, or VmHWM, its peak since `forget_peak`."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(rematerialisation: str) -> None:
    compute = ComputeConfig("float32", "float32", rematerialisation=rematerialisation)  # type: ignore[arg-type]
    stages = (Stage("s", "m", 1, LearningRate(1e-3)),)
    config = TrainConfig(Path(), stages, DataConfig("", batch_size=B, sequence_length=L), MODEL, compute=compute)
    program = Program(config, MODEL, make_mesh(MeshConfig(), jax.devices()[:1]))
    compiled = program.lower_step().compile()
    memory = compiled.memory_analysis()
    shapes = program.shapes, program.batch_shapes(B)
    arguments = jax.tree.map(lambda shape: jax.device_put(jnp.ones(shape.shape, shape.dtype), shape.sharding), shapes)
    jax.block_until_ready(arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    jax.block_until_ready(compiled(*arguments))
    measured = resident("VmHWM") - before
    estimated = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(json.dumps({"estimated": estimated, "measured": measured}))


if __name__ == "__main__":
    main(sys.argv[1])
