"""Compiles attention kernels with the real TPU compiler and prints the basic blocks of their schedules: run
by `flash_attention.py`.

    PYTHON benchmarks/flash_attention_kernels.py JOBS        # JSON: a list of `Job`s

Prints a line of JSON a job: the blocks of each kernel by its name, or null if the compiler refuses its tiles
(VMEM). A process of its own,
since libtpu dumps only what it was told to dump when it started; tokamax's kernels need an environment of
their own too.
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
HEADS, HEAD_DIM = 48, 128


@dataclass(frozen=True)
class Job:
    """One kernel to compile: `tiles` are (queries, keys, keys of a product) of a peer; of ours,
    `blocks.Sizes`, or those of its table."""

    side: str
    generation: str
    length: int
    direction: str
    tiles: tuple[int, ...] = ()
    options: tuple[str, ...] = ()
    """Of tokamax: "scheduler" for its experimental one, "q_layout", "k_layout" and "v_layout" for those with
    the sequence last."""


def program(job: Job):
    """(function, arguments) of a job, for one chip."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from aurora_jax.chips import smallest_topology
    from aurora_jax.plan.topology import tpu_topology

    mesh = Mesh(np.array(tpu_topology(smallest_topology(job.generation)).devices)[:1], ("x",))
    L, C = job.length, HEAD_DIM

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

    def run(function, *arguments):
        function = jax.shard_map(
            function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
        if job.direction == "backward":
            forward = function
            places = tuple(range(len(arguments)))

            def function(*arguments):
                return jax.grad(lambda *inner: forward(*inner).astype(jnp.float32).sum(), places)(*arguments)

        return function, arguments

    if job.side == "ours":
        from aurora_jax.kernels.flash_attention import flash_attention

        blocks = our_blocks(job, "forward"), our_blocks(job, "backward")

        def ours(q, k, v):
            return flash_attention(q, k, v, generation=job.generation, blocks=blocks)

        return run(ours, struct(1, HEADS, L, C), struct(1, 1, L, C), struct(1, 1, L, C))

    queries, keys, at_once = job.tiles
    splash_sizes = {
        "block_q": queries,
        "block_kv": keys,
        "block_kv_compute": at_once,
        "block_q_dkv": queries,
        "block_kv_dkv": keys,
        "block_kv_dkv_compute": at_once,
        "use_fused_bwd_kernel": True,
    }
    if job.side == "tokamax":
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as tokamax
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as tokamax_mask

        layouts = {name: tokamax.QKVLayout.SEQ_MINOR for name in job.options if name.endswith("layout")}
        config = tokamax.SplashConfig(**splash_sizes, use_experimental_scheduler="scheduler" in job.options, **layouts)
        splash = tokamax.make_splash_mqa_single_device(tokamax_mask.CausalMask((L, L)), config=config)
        return run(splash, struct(HEADS, L, C), struct(L, C), struct(L, C))

    if job.side == "splash":
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((L, L))] * HEADS)
        sizes = splash_attention_kernel.BlockSizes(**splash_sizes)
        splash = splash_attention_kernel.make_splash_mqa_single_device(mask, block_sizes=sizes)
        return run(splash, struct(HEADS, L, C), struct(L, C), struct(L, C))

    from jax.experimental.pallas.ops.tpu import flash_attention as peer

    sizes = peer.BlockSizes(
        block_q=queries,
        block_k_major=keys,
        block_k=at_once,
        block_b=1,
        block_q_major_dkv=queries,
        block_k_major_dkv=keys,
        block_k_dkv=at_once,
        block_q_dkv=queries,
        block_k_major_dq=keys,
        block_k_dq=at_once,
        block_q_dq=queries,
    )

    def flash(q, k, v):
        return peer.flash_attention(q, k, v, causal=True, sm_scale=C**-0.5, block_sizes=sizes)

    return run(flash, *[struct(1, HEADS, L, C)] * 3)


def our_blocks(job: Job, direction: str):
    """Sizes of our kernel's tiles: the job's own for its direction, if it has any."""
    import jax.numpy as jnp

    from aurora_jax.kernels.flash_attention.blocks import Sizes, blocks_for

    sizes = Sizes(*job.tiles) if job.tiles and direction == job.direction else None
    return blocks_for(direction, job.generation, jnp.bfloat16, HEAD_DIM, HEADS, job.length, job.length, sizes)


def main(jobs: list[Job]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(
            JAX_PLATFORMS="cpu", LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        )
        import jax

        from aurora_jax.plan.schedule import dumped_kernels

        for job in jobs:
            for dumped in Path(folder).iterdir():
                dumped.unlink()
            jax.clear_caches()
            function, arguments = program(job)
            try:
                jax.jit(function).lower(*arguments).compile()
            except jax.errors.JaxRuntimeError as error:
                if job.side == "ours" and not job.tiles:
                    raise
                print(job, str(error)[:300], file=sys.stderr)
                print("null", flush=True)
                continue
            kernels = dumped_kernels(Path(folder), job.generation)
            print(
                json.dumps({name: [asdict(block) for block in blocks] for name, blocks in kernels.items()}), flush=True
            )


if __name__ == "__main__":
    main(
        [
            Job(**{name: tuple(value) if isinstance(value, list) else value for name, value in job.items()})
            for job in json.loads(sys.argv[1])
        ]
    )
