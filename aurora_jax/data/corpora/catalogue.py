"""All tasks and mixtures of ours, before they stand in SeqIO's registry; no TensorFlow."""

import math
from collections.abc import Mapping
from pathlib import Path

from aurora_jax.data.corpora import sample_tasks
from aurora_jax.data.corpora.aurora_m import rates
from aurora_jax.data.corpora.aurora_m.tasks import aurora_m_tasks
from aurora_jax.data.text.sources import TaskSpec
from aurora_jax.errors import InputError

MIXTURES: Mapping[str, Mapping[str, float]] = {**sample_tasks.MIXTURES, **rates.MIXTURES}


def task_specs(root: str | Path) -> list[TaskSpec]:
    """Our tasks, their sources looked for under `root`: the folder of a sample corpus or of Aurora-M's
    sources; no file is touched."""
    folder = absolute(root)
    return [*sample_tasks.sample_tasks(folder), *aurora_m_tasks(folder)]


def task_spec(root: str | Path, name: str) -> TaskSpec | None:
    """Our task of that name, its sources looked for under `root`; None if there is none. A corpus may have languages
    that the sample corpus does not have: see `sample_tasks`."""
    named = next((spec for spec in task_specs(root) if spec.name == name), None)
    return named or sample_tasks.sample_task(absolute(root), name)


def stated_rates(mixture: str) -> tuple[tuple[str, float], ...] | None:
    """(task name, rate), by name, of a mixture that is written out, as `sample_fi=0.5,sample_en=0.25`; None for a name.

    Raises:
        InputError: a rate is no positive number, or a task has two.
    """
    if "=" not in mixture:
        return None
    rates: dict[str, float] = {}
    for entry in mixture.split(","):
        task, _, written = entry.partition("=")
        try:
            rate = float(written)
        except ValueError:
            rate = 0.0
        if not task or not 0 < rate < math.inf or task in rates:
            raise InputError(
                f"mixture {mixture!r}: {entry!r} is not a task with its rate. Write each task once, with a rate above "
                "0: sample_fi=0.5,sample_en=0.25"
            )
        rates[task] = rate
    return tuple(sorted(rates.items()))


def absolute(root: str | Path) -> str:
    """A folder's full path, or its address, without a slash at the end."""
    return (str(root) if "://" in str(root) else str(Path(root).absolute())).rstrip("/")
