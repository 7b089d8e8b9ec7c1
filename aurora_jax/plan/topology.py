"""TPU topologies without TPUs: `libtpu` compiles for them on any x86-64 Linux machine."""

import os

from jax.experimental import topologies

from aurora_jax.chips import CHIPS
from aurora_jax.errors import InputError

# libtpu otherwise asks the cloud's metadata server which TPU it is on, and refuses a second process.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_topology(name: str, slices: int = 1) -> topologies.TopologyDescription:
    """The chips of a topology such as `v5p:4x4x4` or `v6e:16x16`, to compile for.

    v4 and v5p slices of whole 4 x 4 x 4 cubes are described as the torus that they are: otherwise gathers of
    weights are compiled as all-reduces of whole matrices. The two cores of a v4 chip are one device, as on
    v5p.

    Args:
        slices: such slices, joined by the data-center network.

    Raises:
        InputError: libtpu is not installed, or it does not know the topology.
    """
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    generation, _, sizes = name.partition(":")
    options: dict = {"num_slices": slices}
    if generation in CHIPS and CHIPS[generation].torus_dimensions == 3:
        options |= {
            "chip_config_name": "megacore" if generation == "v4" else "default",
            "chips_per_host_bounds": (2, 2, 1),
        }
        if sizes.count("x") == 2 and all(size.isdigit() and int(size) % 4 == 0 for size in sizes.split("x")):
            options["wrap"] = (True, True, True)
    try:
        return topologies.get_topology_desc(name, platform="tpu", **options)
    except Exception as error:
        raise InputError(
            f"TPU topology {name!r} cannot be compiled for: {error}\nA topology is named like v5p:4x4x4 or "
            "v6e:16x16, and libtpu must be "
            "installed (pip install 'aurora-jax[tpu]')."
        ) from error
