"""Compiles products of known shapes as Pallas kernels for any TPU generation, in a process of its own; prints
the bundles and the products' time that `plan/schedule.py` reads for each.

M x K times K x N; a kernel runs `times` of them, on operands of its own.
"""

import json
import os
import sys
import tempfile
from pathlib import Path


def main(cases: list[dict]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(
            JAX_PLATFORMS="cpu", LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        )
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.experimental import pallas as pl
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        from aurora_jax.chips import smallest_topology
        from aurora_jax.plan.schedule import dumped_kernels
        from aurora_jax.plan.topology import tpu_topology

        found = []
        for place, case in enumerate(cases):
            M, K, N, times = case["M"], case["K"], case["N"], case["times"]
            mesh = Mesh(np.array(tpu_topology(smallest_topology(case["generation"])).devices)[:1], ("x",))
            here = NamedSharding(mesh, PartitionSpec())
            precision = jax.lax.Precision.HIGHEST if case["dtype"] == "float32" else jax.lax.Precision.DEFAULT

            def kernel(*refs, times=times, precision=precision):
                for left, right, result in zip(refs[:times], refs[times : 2 * times], refs[2 * times :], strict=True):
                    product_MN = jnp.dot(left[...], right[...], preferred_element_type=jnp.float32, precision=precision)
                    result[...] = product_MN.astype(jnp.bfloat16)

            run = pl.pallas_call(
                kernel, out_shape=[jax.ShapeDtypeStruct((M, N), jnp.bfloat16)] * times, name=f"products_{place}"
            )
            arguments = [
                jax.ShapeDtypeStruct(shape, case["dtype"], sharding=here)
                for shape in ((M, K), (K, N))
                for _ in range(times)
            ]
            whole = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
            jax.jit(whole).lower(*arguments).compile()
            kernels = dumped_kernels(Path(folder), case["generation"])
            (blocks,) = (blocks for name, blocks in kernels.items() if f"products_{place}" in name)
            found.append(
                {what: sum(getattr(block, what) for block in blocks) for what in ("bundles", "matrix_cycles", "cycles")}
            )
        print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
