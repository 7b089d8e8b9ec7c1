"""All tasks and mixtures of ours, before they stand in SeqIO's registry; no TensorFlow."""

from collections.abc import Mapping
from pathlib import Path

from aurora_jax.data.corpora import sample_tasks
from aurora_jax.data.corpora.aurora_m import rates
from aurora_jax.data.corpora.aurora_m.tasks import aurora_m_tasks
from aurora_jax.data.text.sources import TaskSpec

MIXTURES: Mapping[str, Mapping[str, float]] = {**sample_tasks.MIXTURES, **rates.MIXTURES}


def task_specs(root: str | Path) -> list[TaskSpec]:
    """Our tasks, their sources looked for under `root`: the folder of a sample corpus or of Aurora-M's
    sources; no file is touched."""
    folder = absolute(root)
    return [*sample_tasks.sample_tasks(folder), *aurora_m_tasks(folder)]


def absolute(root: str | Path) -> str:
    """A folder's full path, or its address, without a slash at the end."""
    return (str(root) if "://" in str(root) else str(Path(root).absolute())).rstrip("/")
