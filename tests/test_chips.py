"""Facts of chips against the public sheets, in the sheets' own units, and against JAX's table of TPUs."""

import math
from dataclasses import dataclass

import pytest
from jax.experimental.pallas import tpu as pltpu

from aurora_jax.chips import CHIPS, GIB, chip_of


@dataclass(frozen=True)
class Sheet:
    """What Google Cloud's page on a chip says; of two pages that differ, the newer. None where no page has it."""

    teraflops: float
    """Peak of a chip, bf16."""
    hbm: float
    """GB or GiB; both are 2**30 bytes in JAX's table."""
    hbm_gigabytes: float
    """Per second."""
    pod: tuple[int, ...]
    """Chips along each dimension of a whole pod's torus."""
    bidirectional: float | None = None
    """Inter-chip interconnect of a chip in GB/s, both directions added up."""
    gigabits: float | None = None
    """The same in the older sheets, Gbit/s in one direction."""
    all_reduce: float | None = None
    """Of a pod, TB/s."""
    bisection: float | None = None
    """Of a pod, TB/s."""
    network: float | None = None
    """Data-center network of a chip, Gbit/s."""


SHEETS = {
    "v4": Sheet(275, 32, 1200, (16,) * 3, gigabits=2400, all_reduce=1100 * 1.024**5, bisection=24 * 1.024**4),
    "v5e": Sheet(197, 16, 819, (16, 16), 400, 1600, all_reduce=51.2, bisection=1.6, network=6.4e3 / 256),
    "v5p": Sheet(459, 95, 2765, (16, 20, 28), 1200, 4800, network=50),
    "v6e": Sheet(918, 32, 1638, (16, 16), 800, 3200, all_reduce=102.4, bisection=3.2, network=25.6e3 / 256),
}
"""v4's page has 1.1 PB/s of all-reduce and 24 TB/s of bisection, two digits: with 2,400 Gbit/s a chip they
can only mean 2**50 and 2**40 bytes."""


@pytest.mark.parametrize("name", CHIPS)
def test_facts_are_those_of_the_public_sheets(name):
    chip, sheet = CHIPS[name], SHEETS[name]
    assert chip.peak == sheet.teraflops * 1e12
    assert chip.hbm == sheet.hbm * GIB
    assert chip.hbm_bandwidth == sheet.hbm_gigabytes * 1e9
    assert chip.torus_dimensions == len(sheet.pod)
    if sheet.network is not None:
        assert chip.network == sheet.network * 1e9 / 8


@pytest.mark.parametrize("name", CHIPS)
def test_interconnect_is_what_leaves_a_chip_in_one_direction(name):
    """One convention for all chips: four ways of the sheets to say it, each turned into bytes per second out
    of a chip."""
    chip, sheet = CHIPS[name], SHEETS[name]
    chips = math.prod(sheet.pod)
    found = {
        "half of both directions": sheet.bidirectional and sheet.bidirectional * 1e9 / 2,
        "bits": sheet.gigabits and sheet.gigabits * 1e9 / 8,
        "a pod's all-reduce": sheet.all_reduce and sheet.all_reduce * 1e12 / chips,
        # A cut across the longest dimension of a torus goes through two links of each row; a chip has two
        # links a dimension.
        "bisection": sheet.bisection and sheet.bisection * 1e12 / (2 * chips / max(sheet.pod)) * 2 * len(sheet.pod),
    }
    assert {how: value for how, value in found.items() if value} == {
        how: pytest.approx(chip.interconnect, rel=0.04 if name == "v4" else 1e-6)
        for how, value in found.items()
        if value
    }


@pytest.mark.parametrize("name", CHIPS)
def test_peak_is_what_the_matrix_units_do_in_a_cycle_times_the_clock(name):
    """Units and their size as JAX has them; a whole number of rows a cycle, so that clock and peak belong together."""
    chip = CHIPS[name]
    jax_has = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(name), chip.cores)
    assert (chip.matrix_units, chip.matrix_columns, chip.vmem) == (
        jax_has.num_mxus,
        jax_has.mxu_column_size,
        jax_has.vmem_capacity_bytes,
    )
    a_cycle = chip.cores * chip.matrix_units * chip.matrix_columns**2 * 2 * chip.rows_per_cycle
    assert chip.peak == pytest.approx(a_cycle * chip.clock, rel=2e-3)
    assert chip.rows_per_cycle == (2 if name == "v6e" else 1)


@pytest.mark.parametrize("name", CHIPS)
def test_facts_agree_with_jax(name):
    """Its figures are rounded to three digits; of the cores' halves it has to be told how many."""
    chip = CHIPS[name]
    jax_has = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(name), chip.cores)
    assert chip.cores == pltpu.ChipVersion(name).num_physical_tensor_cores_per_chip
    assert chip.peak == pytest.approx(jax_has.bf16_ops_per_second * chip.cores, rel=5e-3)
    assert chip.hbm == pytest.approx(jax_has.hbm_capacity_bytes * chip.cores, rel=1e-2)


@pytest.mark.parametrize("name", CHIPS)
def test_a_chip_goes_by_its_names_and_no_other_chip_does(name):
    """The TPU compiler's own name is tested in test_observability.py."""
    assert all(chip_of(kind) is CHIPS[name] for kind in CHIPS[name].device_kinds)
    assert sum(len(chip.device_kinds) for chip in CHIPS.values()) == len(
        {kind for chip in CHIPS.values() for kind in chip.device_kinds}
    )


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3", "TPU v2", ""])
def test_other_devices_are_no_chip_of_ours(kind):
    assert chip_of(kind) is None
