"""Tasks of the harness, run on our models; what came out, in its own layout and as one table."""

import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from aurora_jax.errors import InputError
from aurora_jax.evaluate.harness.suites import PREFIX, SUITES
from aurora_jax.evaluate.intervals import compare, detectable_difference, mean_interval
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.mesh import MeshConfig
from aurora_jax.storage.places import Location

TASKS = Path(__file__).parent / "tasks"
MISSING = "the harness is not installed: pip install -e '.[eval]' (lm-eval 0.4.13)"


def require_harness() -> None:
    """Raises InputError, with the command that installs it, if lm-eval is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(MISSING)


def run_tasks(
    checkpoint: Location,
    tasks: Sequence[str],
    *,
    include_path: Path | None,
    task_data: Path | None,
    limit: int | None,
    shots: int | None,
    batch_tokens: int,
    compute: ComputeConfig,
    mesh: MeshConfig,
    answers: Path | None = None,
) -> dict[str, Any]:
    """The harness's results of one model, samples included.

    Args:
        tasks: names of tasks, groups or tags; `suite_` and a language for one of `SUITES`.
        include_path: folder with task files of the user's own.
        task_data: folder with the data of `tasks/`.
        limit: documents a task.
        shots: examples before each document, in place of what the tasks say.
        batch_tokens: tokens that are read at once.
        answers: folder that keeps answers as they come; those that are there are not asked again, of the very same
            weights, precision and length.

    Raises:
        InputError: there is no such task, its data cannot be read, the checkpoint is not one, or it has no checksums by
            which answers could be known as its own.
    """
    require_harness()
    # Its bootstrap forks, after JAX has started threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from aurora_jax.evaluate.harness.model import HarnessModel

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"--include-path {include_path}: no such folder.")
    folders = [str(TASKS), *([str(include_path)] if include_path else [])]
    metadata = {"data": str(task_data)} if task_data else {}
    asked = _shots_of(tasks)
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if any(task not in manager.all_tasks for task in asked):  # its own are thousands of files, which takes long
        manager = TaskManager(include_path=folders, metadata=metadata)
    if unknown := [task for task in asked if task not in manager.all_tasks]:
        raise InputError(_unknown(unknown[0], manager.all_tasks))
    model = HarnessModel(checkpoint, batch_tokens=batch_tokens, compute=compute, mesh=mesh)
    try:
        results = simple_evaluate(
            model,
            tasks=[each for name, count in asked.items() for each in _loaded(manager, name, count)],
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            use_cache=None if answers is None else str(answers / model.identity()),
            bootstrap_iters=1_000,
            log_samples=True,
            metadata=metadata,
        )
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"{', '.join(tasks)}: {_root(error)}. Tasks whose data or metrics come from the network need one; those of "
            f"{TASKS.relative_to(TASKS.parents[3])} read local files (--task-data), and --include-path takes your own."
        ) from error
    if results is None:
        raise InputError("The harness has given no results.")
    results["config"]["model"] = "aurora_jax"
    results["config"]["model_args"] = model.get_model_info()
    results["aurora"] = {"merged_continuations": model.merged, "scores": scores_of(results)}
    return dict(results)


def _loaded(manager: Any, name: str, shots: int | None) -> list[Any]:
    """A task by its name, or, where a suite says with how many examples, itself."""
    if shots is None:
        return [name]
    tasks = list(manager.load([name])["tasks"].values())
    for task in tasks:
        task.set_config(key="num_fewshot", value=shots)
    return tasks


def _shots_of(names: Sequence[str]) -> dict[str, int | None]:
    """Tasks, those of suites among them, and how many examples a suite gives each; None for what the task says. Raises
    InputError for a suite that is not there."""
    asked: dict[str, int | None] = {}
    for name in names:
        if not name.startswith(PREFIX):
            asked[name] = None
        elif (suite := SUITES.get(name.removeprefix(PREFIX))) is not None:
            asked |= suite
        else:
            raise InputError(f"There is no suite {name!r}; there are {', '.join(PREFIX + each for each in SUITES)}.")
    return asked


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _unknown(task: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(task, known, 3)
    return f"There is no task {task!r} in the harness" + (f"; did you mean {', '.join(near)}?" if near else ".")


def scores_of(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task to its score that is a mean over documents: metric, value with interval, documents, and the smallest
    difference that they can show between two models with such scores (unpaired)."""
    scores = {}
    for task, samples in results["samples"].items():
        metric, values = _values(results["results"][task], samples)
        if metric is None:
            continue
        interval = mean_interval(values)
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("inf")
        scores[task] = {
            "metric": metric,
            **asdict(interval),
            "documents": len(values),
            "detectable": detectable_difference(error * np.sqrt(2)),
            "shots": results.get("n-shot", {}).get(task),
        }
    return scores


def _values(result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[float]]:
    """The first metric of a task that its documents have each, and their values; of several filters the first."""
    for key in result:
        metric, _, name = key.partition(",")
        if not name or metric.endswith("_stderr"):
            continue
        chosen = sorted(
            (sample for sample in samples if sample.get("filter", "none") == name), key=lambda sample: sample["doc_id"]
        )
        values = [sample.get(metric) for sample in chosen]
        if values and all(isinstance(value, bool | int | float) for value in values):
            return metric, [float(value) for value in values if value is not None]
    return None, []


def table_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Several models on the same tasks: each one's scores, and of all but the first the difference to it, paired.

    Raises:
        InputError: two models did not read the same documents.
    """
    names = list(results)
    base = results[names[0]]
    table: dict[str, Any] = {"base": names[0], "models": {}}
    for name in names:
        scores = {task: dict(score) for task, score in results[name]["aurora"]["scores"].items()}
        for task, score in scores.items() if name != names[0] else ():
            before, after = base["samples"][task], results[name]["samples"][task]
            if [sample["doc_hash"] for sample in before] != [sample["doc_hash"] for sample in after]:
                raise InputError(f"{task}: {name} was asked other documents than {names[0]}.")
            _, ours = _values(results[name]["results"][task], after)
            _, theirs = _values(base["results"][task], before)
            score["against_base"] = asdict(compare(theirs, ours))
        table["models"][name] = {"scores": scores, "model": results[name]["config"]["model_args"]}
    return table


def to_json(results: Mapping[str, Any]) -> str:
    """As the harness writes it."""
    from lm_eval.utils import handle_non_serializable

    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"
