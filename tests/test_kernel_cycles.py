"""Cycles of kernels: what the reader of schedules counts, against products whose shapes are known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aurora_jax.chips import CHIPS
from aurora_jax.errors import InputError
from aurora_jax.plan.schedule import basic_blocks

# Passes in bf16 that a product in fp32 takes at the highest precision.
PASSES = {"bfloat16": 1, "float32": 6}
# K = 128 fills half of v6e's 256 x 256 unit and takes as long as K = 256. The five are those of a backward pass for
# 1,024 x 1,024 scores.
PRODUCTS = [
    *(
        {"generation": name, "dtype": dtype, "M": 128, "K": 128, "N": 256, "times": 1}
        for name in CHIPS
        for dtype in PASSES
    ),
    {"generation": "v6e", "dtype": "bfloat16", "M": 256, "K": 256, "N": 256, "times": 1},
    *({"generation": name, "dtype": "bfloat16", "M": 1024, "K": 128, "N": 1024, "times": 5} for name in ("v5e", "v5p")),
]


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, int]]:
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, exists for Linux on x86-64 only")
    script = Path(__file__).with_name("known_products.py")
    done = subprocess.run([sys.executable, script, json.dumps(PRODUCTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", range(len(PRODUCTS)), ids=lambda case: "-".join(map(str, PRODUCTS[case].values())))
def test_products_take_what_the_published_peak_says(compiled, case):
    product, chip = PRODUCTS[case], CHIPS[PRODUCTS[case]["generation"]]
    flops = PASSES[product["dtype"]] * product["times"] * 2 * product["M"] * product["K"] * product["N"]
    used = min(product["K"] / CHIPS[product["generation"]].matrix_columns, 1.0)
    seconds = flops / (chip.peak / chip.cores) / used
    # Published peaks and clocks are rounded: by up to 0.2 %.
    assert compiled[case]["matrix_cycles"] == pytest.approx(seconds * chip.clock, rel=3e-3)
    assert compiled[case]["cycles"] >= max(compiled[case]["matrix_cycles"], compiled[case]["bundles"])


@pytest.mark.parametrize("case", [-2, -1], ids=["v5e", "v5p"])
def test_five_products_of_a_tile_take_10_240_cycles(compiled, case):
    """5 x 1,024 x 1,024 x 128 multiplications by four units of 128 x 128; the compiler issues them in fewer bundles."""
    assert compiled[case]["matrix_cycles"] == 5 * 1024 * 1024 * 128 // (4 * 128 * 128) == 10_240
    assert compiled[case]["bundles"] < 10_240 <= compiled[case]["cycles"]


def bundles(path: Path, *operations: str) -> Path:
    path.write_text(
        "".join(
            f"{place:#x}     : > {{ %{place} = {operation} }}\n" for place, operation in enumerate(operations, start=1)
        )
    )
    return path


def test_a_block_takes_its_products_or_its_bundles(tmp_path):
    """Two products in one unit wait for each other, in two they do not; a block without products takes its bundles."""
    one = bundles(
        tmp_path / "one", "vmatmul.bf16.gmra.mxu0 %v1", "vmatmul.bf16.vlgmr.msra.gmra.mxu0 %v2", "vadd.f32 %v1, %v2"
    )
    two = bundles(tmp_path / "two", "vmatmul.bf16.gmra.mxu0 %v1", "vmatmul.bf16.gmra.mxu3 %v2", "vadd.f32 %v1, %v2")
    none = bundles(tmp_path / "none", *["vadd.f32 %v1, %v2"] * 7)
    cycles = [[block.cycles for block in basic_blocks(path, "v5e")] for path in (one, two, none)]
    assert cycles == [[32], [16], [7]]
    (block,) = basic_blocks(bundles(tmp_path / "v6e", "vmatmul.mubr.bf16.gmra.mxu1 %v1"), "v6e")
    assert (block.bundles, block.cycles) == (1, 8)
    (block,) = basic_blocks(bundles(tmp_path / "lmr", "vmatmul.lmr.bf16.vlgmr.msra.gmra.16.mxu1 %v1"), "v5e")
    assert block.cycles == 8
    assert [CHIPS[name].rows_per_cycle for name in ("v4", "v5e", "v5p", "v6e")] == [1, 1, 1, 2]


def test_an_unknown_product_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"vmatmul\.s8\.gmra\.mxu0"):
        basic_blocks(bundles(tmp_path / "integers", "vmatmul.s8.gmra.mxu0 %v1"), "v5e")
