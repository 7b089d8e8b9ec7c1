"""Figures of plans that are written down: each config's docstring agrees with itself, with the chips and with
physics, and every table that repeats its figures has the same. What a plan says now is compared in
`test_plan.py` (it compiles)."""

import math
import re
from pathlib import Path

import pytest

from aurora_jax.chips import CHIPS, GIB
from aurora_jax.cli import load_config
from aurora_jax.model.config import PRESETS
from aurora_jax.model.flops import flops_per_token

ROOT = Path(__file__).resolve().parents[1]
MODEL = PRESETS["starcoderplus"]
CONFIGS = {path.stem: path for path in sorted(ROOT.glob("configs/starcoderplus_*.py"))}
STATED = re.compile(
    r"Planned \(an estimate of the TPU compiler, [^)]+\): (?P<memory>[\d.]+) of (?P<capacity>\d+) GiB a chip, "
    r"(?P<step>[\d.]+) s a step \((?P<compute>[\d.]+) s compute, (?P<attention>[\d.]+) s attention, "
    r"(?P<exposed>[\d.]+) s of collectives that nothing hides\), MFU at most (?P<mfu>[\d.]+)%, "
    r"(?P<days>[\d.]+) days for 435B tokens\."
)


def stated(name: str) -> dict[str, float]:
    """The figures of a config's docstring."""
    found = STATED.search(" ".join(CONFIGS[name].read_text().split('"""')[1].split()))
    assert found is not None, f"{name}: its docstring states no plan, or in other words"
    return {what: float(value) for what, value in found.groupdict().items()}


def pod(name: str) -> tuple[str, int]:
    """Generation and chips of a config's command."""
    (topology,) = re.findall(r"--topology (\S+)", CONFIGS[name].read_text())
    generation, _, sizes = topology.partition(":")
    slices = re.findall(r"--slices (\d+)", CONFIGS[name].read_text())
    return generation, math.prod(map(int, sizes.split("x"))) * int(slices[0] if slices else 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_stated_figures_agree_with_each_other_and_with_the_chips(name):
    figures, (generation, chips), data = stated(name), pod(name), load_config(CONFIGS[name]).data
    chip, tokens = CHIPS[generation], data.batch_size * data.sequence_length
    assert figures["capacity"] * GIB == chip.hbm
    assert figures["step"] == pytest.approx(
        sum(figures[part] for part in ("compute", "attention", "exposed")), abs=0.016
    )
    mfu = flops_per_token(MODEL, data.sequence_length) * tokens / (figures["step"] * chips * chip.peak)
    assert figures["mfu"] / 100 == pytest.approx(mfu, rel=0.006 / figures["step"] + 6e-4)
    assert figures["days"] == pytest.approx(435e9 / tokens * figures["step"] / 86_400, abs=0.06)


@pytest.mark.parametrize("name", CONFIGS)
def test_stated_figures_are_not_below_physics(name):
    """Products of the weights, and seven or nine of attention's triangle: two for each time forward, five backward."""
    figures, (generation, chips), config = stated(name), pod(name), load_config(CONFIGS[name])
    tokens, length = config.data.batch_size * config.data.sequence_length, config.data.sequence_length
    peak = chips * CHIPS[generation].peak
    in_matrices = (
        MODEL.layers * MODEL.width * (2 * MODEL.width + 2 * MODEL.kv_heads * MODEL.head_dim + 2 * MODEL.mlp_width)
    )
    assert figures["compute"] >= 6 * (in_matrices + MODEL.vocabulary_size * MODEL.width) * tokens / peak
    products = 9 if config.compute.rematerialisation == "full" else 7
    assert (
        figures["attention"] >= products * MODEL.layers * MODEL.heads * MODEL.head_dim * length * tokens / peak - 0.005
    )
    assert figures["mfu"] < 100


README_ROW = re.compile(
    r"\| `(\w+)\.py` \(.*?\) \| ([\d.]+) of (\d+) GiB \| ([\d.]+) s \| ([\d.]+)% \| ([\d.]+) days \|"
)


def test_the_readme_repeats_what_the_configs_state():
    rows = README_ROW.findall((ROOT / "README.md").read_text())
    assert {row[0] for row in rows} == {name for name in CONFIGS if not name.endswith("_2k")}
    for name, *figures in rows:
        expected = stated(name)
        assert list(map(float, figures)) == [
            expected[what] for what in ("memory", "capacity", "step", "mfu", "days")
        ], name


@pytest.mark.parametrize(
    ("page", "pattern"),
    [
        ("README.md", r"\| {chips} x {generation} \| ([\d.]+) s, (?:MFU at most )?([\d.]+) %"),
        ("benchmarks/README.md", r"estimated step of the 15\.5B model.*?{place}([\d.]+) / [\d.]+ s"),
    ],
)
def test_the_comparison_with_maxtext_has_the_same_figures_on_our_side(page, pattern):
    text = (ROOT / page).read_text()
    for place, name in enumerate(("starcoderplus_v5p_128", "starcoderplus_v5e_256", "starcoderplus_v6e_256")):
        generation, chips = pod(name)
        before = r"(?:[\d.]+ / [\d.]+ s, [\d.]+x; )" * place
        written = re.search(pattern.format(chips=chips, generation=generation, place=rf"\| {before}"), text)
        assert written is not None, (page, name)
        expected = stated(name)
        assert [float(value) for value in written.groups()] == [expected["step"], expected["mfu"]][
            : len(written.groups())
        ]


def test_the_tutorial_repeats_what_its_config_states():
    expected, text = stated("starcoderplus_v5p_128"), (ROOT / "docs" / "tutorials" / "engineer.md").read_text()
    for row in (
        f"| HBM a chip, peak | {expected['memory']} of {expected['capacity']:.0f} GiB |",
        f"| {expected['step']:.2f} s: {expected['compute']:.2f} compute, {expected['attention']:.2f} "
        "attention kernels, "
        f"{expected['exposed']:.2f} collectives that nothing hides |",
        f"| MFU, at most | {expected['mfu']:.1f} % |",
        f"| 435B tokens | {expected['days']:.1f} days |",
    ):
        assert row in text
