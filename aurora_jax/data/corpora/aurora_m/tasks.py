"""Aurora-M's sources as tasks: what they are, where their files are expected, and how records become documents.

The names are those of the model card, the authors' blog and the paper's abstract. A source of the Hugging
Face hub is expected as the hub lays it out, under its own name:

    huggingface-cli download --repo-type dataset nvidia/HelpSteer --local-dir DATA_ROOT/nvidia/HelpSteer

Layouts and fields are as published; "(memory)" in a note marks those that were written down from memory, and
are to be checked against the files. Rates are in `rates.py`. In the second stage, raw text goes through a
step more (`MostSymbols`), so it has a task of its own there, whose name ends in `_cat`.
"""

from aurora_jax.data.corpora.aurora_m.entry import Entry
from aurora_jax.data.corpora.aurora_m.instructions import INSTRUCTIONS
from aurora_jax.data.corpora.aurora_m.texts import TEXTS
from aurora_jax.data.text.documents import MostSymbols
from aurora_jax.data.text.sources import Source, TaskSpec

ENTRIES: tuple[Entry, ...] = (*TEXTS, *INSTRUCTIONS)


def aurora_m_tasks(root: str) -> list[TaskSpec]:
    """The tasks over the sources in the folder `root`: one for each source and, where the stages prepare it
    differently, stage."""
    specs = {}
    for entry in ENTRIES:
        for stage in entry.stages:
            name = entry.task(stage)
            cleaned = stage == "cat" and entry.is_raw_text
            splits = {"train": entry.files, "validation": entry.validation}
            specs[name] = TaskSpec(
                name,
                Source(
                    {
                        split: tuple(f"{root}/{entry.origin}/{file}" for file in files)
                        for split, files in splits.items()
                        if files
                    },
                    entry.format,
                    text=entry.text,
                    fields=entry.fields,
                    language=entry.language,
                    license=entry.license,
                ),
                (*entry.steps, MostSymbols()) if cleaned else entry.steps,
                kind=entry.kind,
                stages=(stage,) if entry.is_raw_text else entry.stages,
                origin=entry.origin,
                note=entry.note,
            )
    return list(specs.values())
