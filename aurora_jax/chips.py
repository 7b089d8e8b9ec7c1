"""Facts of TPU chips, in one place.

Sources: Google Cloud's TPU system architecture pages (v4, v5e, v5p, v6e: peak, HBM capacity and bandwidth, interconnect); the clocks are
those at which the compiler's cycles give the published peaks. From memory, and to be overridden: prices (on-demand list prices in US
regions) and the share of the data-center network (a 200 Gbit/s host adapter over the host's chips).
"""

from dataclasses import dataclass

GIB, GB = 1 << 30, 10**9


@dataclass(frozen=True)
class Chip:
    """One TPU chip."""

    hbm: int
    """Bytes of memory."""
    peak: float
    """bf16 FLOP/s."""
    clock: float
    """Cycles per second of a TensorCore."""
    cores: int
    """TensorCores; two work as one device."""
    hbm_bandwidth: float
    """Bytes per second."""
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


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.05e9, 2, 1228 * GB, 300 * GB, 3, 6.25 * GB, 3.22, _CUBES),
    "v5e": Chip(16 * GIB, 197e12, 1.5e9, 1, 819 * GB, 200 * GB, 2, 3.1 * GB, 1.20, _SQUARES),
    "v5p": Chip(95 * GIB, 459e12, 1.75e9, 2, 2765 * GB, 600 * GB, 3, 6.25 * GB, 4.20, _CUBES),
    "v6e": Chip(32 * GIB, 918e12, 1.75e9, 1, 1640 * GB, 448 * GB, 2, 6.25 * GB, 2.70, _SQUARES),
}
