"""What a run's folder says of itself beside its figures: OUTPUT/run.json (`aurora_jax/train/facts.py`)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aurora_jax.errors import InputError
from aurora_jax.storage.places import Place
from aurora_jax.storage.records import object_in

UNDETERMINED = "und"


@dataclass(frozen=True)
class RunRecord:
    """What a report needs to know of a run; empty for one of a version that did not say it."""

    languages: Mapping[str, str] = field(default_factory=dict)
    """Tag of each task's text, trained on or held out."""
    learnt: tuple[str, ...] = ()
    """Held-out tasks in a language that the stage table has and the run is not there to keep; none where it names
    nothing to keep."""
    kept: tuple[str, ...] = ()
    """Held-out tasks that are to stay as they were (`evaluation.keep`)."""

    def language(self, task: str) -> str:
        """The tag of a task's text; what its name says where the run does not (sample_clean_fi and sample_fi are both
        Finnish), and its name for a text that says nothing."""
        tag = self.languages.get(task, UNDETERMINED)
        return task.removeprefix("sample_").removeprefix("clean_") if tag == UNDETERMINED else tag

    def subjects(self, tasks: Iterable[str]) -> dict[str, str]:
        """What each task is called beside the others (see `charts.Curves`): its language, with the task if they share
        it."""
        languages = {task: self.language(task) for task in tasks}
        several = Counter(languages.values())
        return {task: tag if several[tag] == 1 else f"{tag}/{task}" for task, tag in languages.items()}


def read_run_record(run_directory: Place) -> RunRecord:
    """Of a run's folder. Raises InputError if its run.json is malformed."""
    path = run_directory / "run.json"
    if not path.is_file():
        return RunRecord()
    facts = object_in(path.read_bytes(), path)
    try:
        return record_of(facts)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not the facts of a run: {error!r}") from error


def record_of(facts: Mapping[str, Any]) -> RunRecord:
    """Of the facts of a run, whichever version wrote them."""
    languages, kept = facts.get("languages", {}), tuple(facts.get("keep", ()))
    if not kept:
        return RunRecord(languages)
    record = RunRecord(languages, kept=kept)
    trained = {record.language(task) for stage in facts["stages"] for task in stage["rates"]}
    spared = {record.language(task) for task in kept}
    learnt = [task for task in facts["held_out"] if record.language(task) in trained - spared]
    return RunRecord(languages, tuple(learnt), kept)
