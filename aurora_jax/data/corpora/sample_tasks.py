"""Tasks and mixtures over a sample corpus (`aurora data sample DIR`).

    sample_{language}         DIR/train/{language}.jsonl; its validation split is DIR/heldout/{language}.jsonl
    sample_clean_{language}   DIR/clean/{language}.jsonl; the same validation split
    nano_base, nano_cap, nano_cat   the mixtures of `MIXTURES`

Any folder of that layout is such a corpus, and any name of a file in it a language: `sample_sw` reads
DIR/train/sw.jsonl.

Use them through the token store: SeqIO's packing would take token 0 for padding.
"""

import re
from collections.abc import Mapping

from aurora_jax.data.text.sources import Source, TaskSpec
from aurora_jax.languages import LANGUAGES

# Rates are shares of the sequences. In CAP and CAT half of what is read is English and code, replayed so that
# they are not forgotten while the four new languages are learnt; at a sixth each, both rose by 4 % in bits
# per byte.
REPLAY = {"en": 0.28, "code": 0.24, "fi": 0.12, "hi": 0.12, "ja": 0.12, "vi": 0.12}
MIXTURES: Mapping[str, Mapping[str, float]] = {
    "nano_base": {"sample_en": 1 / 2, "sample_code": 1 / 2},
    "nano_cap": {f"sample_{language}": rate for language, rate in REPLAY.items()},
    "nano_cat": {f"sample_clean_{language}": rate for language, rate in REPLAY.items()},
}


PARTS = {"sample": "train", "sample_clean": "clean"}
"""What tasks are called -> the folder in which their documents are."""


def sample_tasks(root: str) -> list[TaskSpec]:
    """The tasks over the sample corpus in the folder `root`."""
    return [_task(root, prefix, language) for prefix in PARTS for language in LANGUAGES]


def sample_task(root: str, name: str) -> TaskSpec | None:
    """The task of that name over a corpus in the folder `root`, of whatever language; None if the name is not of the
    form `sample_...`."""
    found = re.fullmatch(r"(sample_clean|sample)_([\w-]+)", name)
    return found and _task(root, *found.groups())


def _task(root: str, prefix: str, language: str) -> TaskSpec:
    return TaskSpec(
        f"{prefix}_{language}",
        Source(
            {
                "train": (f"{root}/{PARTS[prefix]}/{language}.jsonl",),
                "validation": (f"{root}/heldout/{language}.jsonl",),
            },
            "jsonl",
            fields={"language": "language"},
            language=language,
            license="of the packages in manifest.json",
        ),
    )
