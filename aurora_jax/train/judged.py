"""What a run is judged on: it must be said, or be said to be nothing."""

from collections.abc import Callable, Container, Iterable

from aurora_jax.errors import InputError
from aurora_jax.train.config import EvaluationConfig

MOST_NAMED = 12


def judged_on(
    evaluation: EvaluationConfig, trained: Iterable[str], splits: Callable[[str], Container[str]]
) -> tuple[str, ...]:
    """The run's held-out tasks; prints a line where there are to be none.

    Args:
        evaluation: the run's.
        trained: tasks of its mixtures, to name those that have a held-out part.
        splits: of a task.

    Raises:
        InputError: the run does not say what it is judged on.
    """
    if evaluation.tasks is not None:
        if not evaluation.tasks:
            print("evaluation: none; the run is not judged on any text (evaluation.tasks is empty)", flush=True)
        return evaluation.tasks
    candidates = [task for task in trained if "validation" in splits(task)]
    named = " ".join(candidates[:MOST_NAMED]) + (" ..." if len(candidates) > MOST_NAMED else "")
    raise InputError(
        "The run does not say what it is judged on: give the tasks whose validation split it is measured on, "
        f"--evaluation.tasks {named or 'TASK ...'} or EvaluationConfig(tasks=(...)) in the config. "
        + (
            "Of the tasks of its mixtures these have one. "
            if candidates
            else "No task of its mixtures has one; those of the sample corpus do (sample_en, sample_code ...). "
        )
        + "To train unmeasured, give --evaluation.tasks and nothing behind it."
    )
