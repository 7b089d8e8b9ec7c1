"""Facts of TPU chips, in one place.

Sources: the pages of Google Cloud's TPU documentation on v4, v5e, v5p and v6e (read 2026-11-25). Conventions:

- Interconnect is what leaves a chip, in one direction: half of what the newer sheets call bidirectional (400 GB/s for
  v5e, 1,200 for v5p, 800 for v6e), and what the older ones gave in Gbit/s (1,600 for v5e, 4,800 for v5p, 2,400 for v4).
  A pod's all-reduce bandwidth in the sheets is this number times its chips; for v6e, too, whose oldest sheet had 3,584
  Gbit/s beside it.
- HBM is in units of 2**30 bytes (some sheets say GB), its bandwidth in 10**9 bytes a second. v5e's is 819 in one sheet,
  800 GiB in another; v6e's is 1,638 in the newest, 1,640 in an older one.
- The clock is that at which the matrix units give the published peak: a row a cycle for each of them, two on v6e.

From memory, and to be overridden: prices (on-demand list prices in US regions), and v4's share of the
data-center network.
"""

from dataclasses import dataclass

GIB, MIB, GB = 1 << 30, 1 << 20, 10**9


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One TPU chip."""

    hbm: int
    """Bytes of memory."""
    hbm_bandwidth: float
    """Bytes per second."""
    peak: float
    """bf16 FLOP/s."""
    clock: float
    """Cycles per second of a TensorCore."""
    cores: int
    """TensorCores; two work as one device."""
    matrix_units: int
    """Of a TensorCore."""
    matrix_columns: int
    """Columns of a matrix unit, and its rows."""
    vmem: int
    """Bytes of vector memory of a TensorCore."""
    interconnect: float
    """Bytes per second out of a chip, over all its links together."""
    torus_dimensions: int
    """Of the interconnect: its links are divided evenly over them."""
    network: float
    """Bytes per second of a chip's share of the data-center network."""
    price: float
    """US dollars a chip-hour, on demand."""
    sizes: tuple[str, ...]
    """Topologies that can be rented, smallest first."""
    device_kinds: tuple[str, ...]
    """What JAX calls it (`jax.Device.device_kind`): on a machine, or by the TPU compiler."""

    @property
    def flops_per_cycle(self) -> float:
        """bf16 FLOPs of all TensorCores in a cycle, at the published peak."""
        return self.peak / self.clock

    @property
    def rows_per_cycle(self) -> int:
        """Rows that a matrix unit takes a cycle at the published peak, each times a whole square of weights.

        A product that fills half of the square takes as long as one that fills it.
        """
        return round(self.flops_per_cycle / self.cores / (2 * self.matrix_units * self.matrix_columns**2))


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

CHIPS = {
    "v4": Chip(
        hbm=32 * GIB, hbm_bandwidth=1200 * GB, peak=275e12, clock=1.05e9, cores=2,
        matrix_units=4, matrix_columns=128, vmem=16 * MIB,
        interconnect=300 * GB, torus_dimensions=3, network=6.25 * GB, price=3.22, sizes=_CUBES,
        device_kinds=("TPU v4",),
    ),
    "v5e": Chip(
        hbm=16 * GIB, hbm_bandwidth=819 * GB, peak=197e12, clock=1.5e9, cores=1,
        matrix_units=4, matrix_columns=128, vmem=128 * MIB,
        interconnect=200 * GB, torus_dimensions=2, network=3.125 * GB, price=1.20, sizes=_SQUARES,
        device_kinds=("TPU v5 lite", "TPU v5e"),
    ),
    "v5p": Chip(
        hbm=95 * GIB, hbm_bandwidth=2765 * GB, peak=459e12, clock=1.75e9, cores=2,
        matrix_units=4, matrix_columns=128, vmem=64 * MIB,
        interconnect=600 * GB, torus_dimensions=3, network=6.25 * GB, price=4.20, sizes=_CUBES,
        device_kinds=("TPU v5", "TPU v5p"),
    ),
    "v6e": Chip(
        hbm=32 * GIB, hbm_bandwidth=1638 * GB, peak=918e12, clock=1.75e9, cores=1,
        matrix_units=2, matrix_columns=256, vmem=128 * MIB,
        interconnect=400 * GB, torus_dimensions=2, network=12.5 * GB, price=2.70, sizes=_SQUARES,
        device_kinds=("TPU v6 lite", "TPU v6e"),
    ),
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for what is no TPU that we know."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def smallest_topology(generation: str) -> str:
    """The smallest slice of a generation, such as v5e:2x2, for what one chip of it tells."""
    return f"{generation}:{CHIPS[generation].sizes[0]}"
