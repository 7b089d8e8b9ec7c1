"""The mixtures `aurora_m_cap` and `aurora_m_cat`: rates for the tasks of `tasks.py`.

What is known of Aurora-M: CAP read all five languages and code with generic instructions; CAT oversampled
Wikipedia and Python, added markdown, subsampled English, dropped text with many numbers and symbols, and read
better instructions, some of those of CAP again, and the train split of the red-team data. English, code and
Wikipedia were replayed in both. CAP lasted 90,000 steps and CAT 14,000, of 2,048 sequences of 2,048 tokens.
Percentages were published in a figure that we could not read.

So every number in `SHARES` is ours, chosen to follow those rules; so are the sizes in `ENTRIES` and
`MOST_EPOCHS`. Within a group the sources share in proportion to the square root of their size, so that small
ones are read more often than large ones, but none more than `MOST_EPOCHS` times: what that takes from a small
source goes to the others of its group.

Rates of a few in a million come out for the smallest sources. The training loop makes its blocks large enough for them
(`mixture.block_size_for`): 2^18 sequences here, 128 steps of Aurora-M's batch, after which the rates hold exactly.
"""

import math
from collections.abc import Mapping

from aurora_jax.data.corpora.aurora_m.tasks import ENTRIES

TOKENS = {"cap": 90_000 * 2048 * 2048, "cat": 14_000 * 2048 * 2048}
"""What Aurora-M read in each stage."""

MOST_EPOCHS = 4.0
"""Up to four epochs are nearly as good as new text (Muennighoff et al. 2023, arXiv 2305.16264)."""

SHARES: Mapping[str, Mapping[str, float]] = {
    # group           of the sequences of each stage
    "web_en": {"cap": 0.26, "cat": 0.15},
    "web_fi": {"cap": 0.09, "cat": 0.095},
    "web_hi": {"cap": 0.09, "cat": 0.095},
    "web_ja": {"cap": 0.09, "cat": 0.095},
    "web_vi": {"cap": 0.09, "cat": 0.095},
    "encyclopedia": {"cap": 0.04, "cat": 0.12},
    "stack_python": {"cap": 0.04, "cat": 0.10},
    "stack_markdown": {"cap": 0.01, "cat": 0.05},
    "stack_other": {"cap": 0.18, "cat": 0.12},
    "instruction": {"cap": 0.08, "cat": 0.0499},
    "safety": {"cap": 0.0, "cat": 0.0001},
    "domain": {"cap": 0.03, "cat": 0.03},
}


def shares_of_group(sizes: Mapping[str, float], tokens: float) -> dict[str, float]:
    """How sources of some sizes (in tokens) share a group's tokens: by the square root of size, none more
    than `MOST_EPOCHS` times.

    Where all of them together are too small for that, each is read equally often.
    """
    most = {name: MOST_EPOCHS * size / tokens for name, size in sizes.items()}
    if sum(most.values()) <= 1:
        return {name: share / sum(most.values()) for name, share in most.items()}
    shares: dict[str, float] = {}
    while True:
        free = {name: math.sqrt(size) for name, size in sizes.items() if name not in shares}
        left = 1 - sum(shares.values())
        wanted = {name: left * weight / sum(free.values()) for name, weight in free.items()}
        too_much = {name: most[name] for name, share in wanted.items() if share > most[name]}
        if not too_much:
            return shares | wanted
        shares |= too_much


def _rates(stage: str) -> dict[str, float]:
    rates: dict[str, float] = {}
    for group, by_stage in SHARES.items():
        sizes = {
            entry.task(stage): entry.billions * 1e9
            for entry in ENTRIES
            if entry.group == group and stage in entry.stages
        }
        if sizes:
            shares = shares_of_group(sizes, by_stage[stage] * TOKENS[stage])
            rates |= {task: by_stage[stage] * share for task, share in shares.items()}
    return rates


MIXTURES: Mapping[str, Mapping[str, float]] = {f"aurora_m_{stage}": _rates(stage) for stage in TOKENS}
