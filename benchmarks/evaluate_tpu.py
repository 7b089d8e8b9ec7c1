"""Requests of the harness at full size, planned: the program that answers them, compiled for v5e 16 x 16 at 15.5B.

    python benchmarks/evaluate_tpu.py [--json FILE]

256 rows of 2,048 tokens, the last 16 of each asked for, in the precision and on the mesh of
configs/starcoderplus_v5e_256_2k.py. Time is the compiler's cycles, the attention kernels' and what it cannot hide of
the collectives; the least is that of the matrix products at the chip's peak.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from aurora_jax.chips import CHIPS
from aurora_jax.cli import load_config
from aurora_jax.model.flops import flops_per_token
from aurora_jax.model.likelihood import GRID, ROWS, Likelihood, Questions
from aurora_jax.model.mesh import batch_parts, make_mesh
from aurora_jax.model.sharding import TENSOR_AXIS, nest, parameter_shapes, parameter_shardings
from aurora_jax.plan.attention_cycles import attention_cycles
from aurora_jax.plan.estimate import collective_rows, compiled
from aurora_jax.plan.plan_command import model_of
from aurora_jax.plan.program import read_program
from aurora_jax.plan.topology import tpu_topology

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "starcoderplus_v5e_256_2k.py"
ROWS_READ, LENGTH, ASKED = 256, 2_048, 16


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    config = load_config(CONFIG)
    model = model_of(config, "starcoderplus")
    mesh, chip = make_mesh(config.mesh, tpu_topology("v5e:16x16").devices), CHIPS["v5e"]
    likelihood = Likelihood(model, config.compute, mesh, isolate_documents=False)
    shardings = parameter_shardings(model, mesh)
    parameters = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, jnp.float32, sharding=sharding),
        nest(parameter_shapes(model)),
        shardings,
    )

    def array(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))

    asked = (batch_parts(mesh) * -(-ROWS_READ // batch_parts(mesh)) * ASKED,)
    questions = Questions(array((ROWS_READ, LENGTH), GRID), array(asked, ROWS), array(asked, ROWS))
    with jax.set_mesh(mesh):
        lowered = likelihood.answering.lower(parameters, questions)
    program = compiled(lowered)
    cost = read_program(program.as_text() or "", chip, 1)
    exposed = sum(row.exposed_seconds for row in collective_rows(cost.collectives, mesh, chip))
    cycles = attention_cycles(
        "v5e",
        model.heads // mesh.shape[TENSOR_AXIS],
        max(model.kv_heads // mesh.shape[TENSOR_AXIS], 1),
        model.head_dim,
        LENGTH,
        alibi=False,
    )
    kernels = sum(cost.kernels.values()) * cycles["forward"] * ROWS_READ / batch_parts(mesh) / chip.cores / chip.clock
    seconds = cost.cycles / chip.clock + kernels + exposed
    least = flops_per_token(model, LENGTH) / 3 * ROWS_READ * LENGTH / (mesh.size * chip.peak)
    tokens = ROWS_READ * LENGTH / seconds
    memory = program.memory_analysis().peak_memory_in_bytes / 2**30
    print(
        f"{seconds:.2f} s a batch (least {least:.2f} s), {tokens:,.0f} tokens/s, {cost.wire_bytes() / 1e9:.1f} GB on "
        f"the wire of a chip, peak {memory:.1f} GiB"
    )
    if given.json:
        row = {"name": "answers of 15.5B on v5e 16 x 16, planned", "ours": seconds, "peer": least, "unit": "s"}
        ratio = seconds / least
        given.json.write_text(json.dumps([{**row, "ratio": ratio, "target": 2.0, "met": ratio <= 2}]) + "\n")


if __name__ == "__main__":
    main()
