"""The picture of a plan: what fills a chip's memory, and what fills a step's time."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from aurora_jax.chips import GIB
from aurora_jax.plan.estimate import Plan


def draw(plan: Plan, path: Path) -> None:
    """Writes two bars as a PNG or SVG, whichever the path ends in."""
    memory = [(name, size / GIB) for name, size in plan.memory_parts.items()]
    seconds = [
        ("compute", plan.compute_seconds),
        ("attention kernels", plan.kernel_seconds),
        ("exposed collectives", plan.exposed_seconds),
    ]
    figure, axes = pyplot.subplots(2, 1, figsize=(9, 4.2), layout="constrained")
    for ax, parts, unit, limit in zip(
        axes, (memory, seconds), ("GiB a chip", "s a step"), (plan.memory_capacity / GIB, None), strict=True
    ):
        left = 0.0
        for number, (name, size) in enumerate(parts):
            ax.barh([0], [size], left=left, height=0.5, color=f"C{number}", label=f"{name}: {size:.2f}")
            left += size
        if limit is not None:
            ax.axvline(limit, color="black", linewidth=2)
            ax.annotate(f" capacity {limit:.0f}", (limit, 0.32), ha="right", va="bottom")
        ax.set_xlim(0, max(left, limit or 0) * 1.04)
        ax.set_ylim(-0.3, 0.6)
        ax.set_yticks([])
        ax.set_xlabel(unit)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.32), ncols=4, frameon=False, fontsize=9)
    slices = f"{plan.slices} x " if plan.slices > 1 else ""
    figure.suptitle(
        f"{slices}{plan.topology}: {plan.step_seconds:.2f} s a step, MFU at most {plan.mfu:.1%} (estimates)",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
