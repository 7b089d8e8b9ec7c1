"""The facts of a run: what its batches and updates follow from. Every checkpoint carries them, and a resume is held to
them.

seed, dropout, batch_size, sequence_length, attend_across_documents
optimizer   all of it but the number of micro-batches, which is a matter of memory
precision   of products and of what is kept between them
stages      the stage table, with each mixture's rates and block size as they were resolved
stores      by task: fingerprint of the recipe, digest of the records, tokens, windows
held_out    the same of the text that the run is measured on
initial     where the first weights came from
languages   of the text of every task, trained on or held out; with `keep`, the held-out tasks that are not to be
            forgotten, for those who judge the run: not compared
left_out    steps, first and last, whose batches a --rollback has left out; what an earlier start had left out stays so
layout      micro-batches, mesh and attention: others give the same updates up to rounding; said, not refused
"""

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from aurora_jax.checkpoints import format
from aurora_jax.data.batches.loader import DataStage, window_count
from aurora_jax.data.batches.mixture import NAMED
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.errors import InputError
from aurora_jax.storage.places import Place, absolute_place
from aurora_jax.train.config import TrainConfig

FREE = {"micro_batches", "moments_dtype", "most_skipped"}
"""Of the optimizer: what another start may choose anew."""

LEFT_OUT = "left_out"

PLAIN = ("seed", "dropout", "batch_size", "sequence_length", "attend_across_documents")


def run_facts(
    config: TrainConfig,
    stages: Sequence[DataStage],
    stores: Mapping[str, TokenStore],
    held_out: Mapping[str, TokenStore],
) -> dict[str, Any]:
    """The facts of a run, as JSON values.

    Args:
        stages: the stage table as the loader has it, with the rates of the tasks that have a store.
        stores: of all tasks of all stages.
        held_out: what the run is measured on.
    """
    optimizer = asdict(config.optimizer)
    micro_batches = optimizer.pop("micro_batches")
    facts = {
        "seed": config.seed,
        "dropout": config.dropout,
        "batch_size": config.data.batch_size,
        "sequence_length": config.data.sequence_length,
        "attend_across_documents": config.data.attend_across_documents,
        "optimizer": optimizer,
        "precision": {
            "compute_dtype": config.compute.compute_dtype,
            "activation_dtype": config.compute.activation_dtype,
        },
        "stages": [
            {**asdict(stage), "rates": dict(data.rates), "block_size": data.block_size}
            for stage, data in zip(config.stages, stages, strict=True)
        ],
        "stores": _described(stores, config.data.sequence_length),
        "held_out": _described(held_out, config.data.sequence_length),
        "initial": _initial(config.initial_checkpoint),
        "languages": {task: store.info.language for task, store in {**stores, **held_out}.items()},
        "keep": config.evaluation.keep,
        "layout": {"micro_batches": micro_batches, "attention": config.compute.attention, "mesh": asdict(config.mesh)},
    }
    return json.loads(json.dumps(facts))


def _described(stores: Mapping[str, TokenStore], sequence_length: int) -> dict[str, dict[str, Any]]:
    return {
        task: {
            "fingerprint": store.info.fingerprint,
            "sources": store.info.sources,
            "tokens": store.info.tokens,
            "windows": window_count(store, sequence_length),
        }
        for task, store in stores.items()
    }


def _initial(path: Place | None) -> dict[str, Any]:
    """The path alone, where there is no checkpoint (any more): a run that resumes does not read it."""
    if path is None:
        return {"path": None}
    try:
        metadata = format.read_metadata(path)
    except InputError:
        return {"path": str(absolute_place(path))}
    return {
        "path": str(absolute_place(path)),
        "source": metadata.source,
        "step": metadata.step,
        "lineage": metadata.lineage,
    }


def require_same_run(
    saved: Mapping[str, Any], ours: Mapping[str, Any], where: Place | str, step: int | None = None
) -> list[str]:
    """Compares a run's facts with those of an earlier start of it.

    Stages that have not begun may change, and so may the stores that only these need; new stages at the end are
    welcome.

    Args:
        saved: the earlier facts; of a version that recorded less, if that is what the checkpoint has.
        where: where they were found.
        step: steps that the run has done; all facts are compared without it.

    Returns:
        What the user should know of the differences that are none of the run, and of what cannot be compared.

    Raises:
        InputError: a fact differs; both values are named.
    """
    for name in PLAIN:
        _require_equal(name, {name: saved.get(name)}, {name: ours[name]}, where)
    for name in ("optimizer", "precision"):
        if name in saved:
            # micro_batches was a fact until 2026-11-25; the moments come back in any dtype.
            _require_equal(name, _without(FREE, saved[name]), _without(FREE, ours[name]), where)
    tasks = _require_same_stages(saved["stages"], ours["stages"], where, step)
    notes = []
    if forgotten := [steps for steps in saved.get(LEFT_OUT, []) if steps not in ours.get(LEFT_OUT, [])]:
        raise InputError(
            f"{where} was written by a run that had left out the batches of the steps {forgotten}, which this start "
            f"does not: its file of them, {LEFT_OUT}.json, is gone or another one. Put it back, or start a new run."
        )
    dtypes = [facts.get("optimizer", {}).get("moments_dtype") for facts in (saved, ours)]
    if dtypes[0] not in (None, dtypes[1]):
        notes.append(
            f"Adam's moments were kept in {dtypes[0]}, this start keeps them in {dtypes[1]}: the updates differ from "
            "those of the earlier start by that rounding"
        )
    if "stores" in saved:
        for task in tasks:
            _require_equal(
                f"the store of {task}", saved["stores"][task], ours["stores"].get(task, {}), where, _OTHER_STORE
            )
        for task in saved["held_out"].keys() & ours["held_out"].keys():
            _require_equal(
                f"the held-out text of {task}", saved["held_out"][task], ours["held_out"][task], where, _OTHER_TEXT
            )
        _require_same_start(saved["initial"], ours["initial"], where)
        if changed := _changed(saved["layout"], ours["layout"]):
            masks = "; dropout draws other masks" if ours["dropout"] else ""
            notes.append(f"this start has another layout ({changed}): the updates are the same up to rounding{masks}")
    else:
        now = {task: store["fingerprint"] for task, store in ours["stores"].items()}
        _require_equal("data", saved["data"], {task: now.get(task) for task in saved["data"]}, where, _OTHER_STORE)
        notes.append(
            f"{where} is of a version that recorded neither rates nor sizes of stores, precision and initial "
            "weights: they cannot be "
            "compared with those of the run's earlier start"
        )
        if not ours["attend_across_documents"]:
            notes.append(
                f"{where} is of a version in which the end of an isolated document was asked for the next "
                "one's first token: from here on "
                "it is not, and the loss is that of fewer tokens"
            )
    return notes


def _without(names: Container[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in names}


_OTHER_STORE = "give the folder of the stores that the run began with (--data.stores), or start a new run"
_OTHER_TEXT = (
    "its figures would not belong on the same curve: give the folder of the stores that the run began with "
    "(--data.stores), leave the task "
    "out of --evaluation.tasks, or start a new run"
)


def _require_same_stages(
    saved: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]], where: Place | str, step: int | None
) -> list[str]:
    """The tasks of the stages that have begun. Raises InputError if one of these differs."""
    begins = np.cumsum([0, *(stage["steps"] for stage in saved[:-1])])
    begun = [stage for stage, first_step in zip(saved, begins, strict=True) if step is None or first_step < step]
    if len(ours) < len(begun):
        raise InputError(
            f"{where} was written by a run that has begun the stages {_names(begun)}, this run has "
            f"{_names(ours)}: these may not go."
        )
    for before, now in zip(begun, ours, strict=False):
        name = f"stage {before['name']}"
        # An earlier version has no rates and no block size.
        fields = [field for field in before if field != "rates"]
        _require_equal(name, {field: before[field] for field in fields}, {field: now[field] for field in fields}, where)
        _require_equal(
            f"the rates of {name}", before.get("rates", now["rates"]), now["rates"], where, _rates_hint(before, now)
        )
    return list(dict.fromkeys(task for stage in begun for task in stage.get("rates", ())))


def _rates_hint(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    then, there = before.get("rates", {}), now["rates"]
    appeared, vanished = [task for task in there if task not in then], [task for task in then if task not in there]
    hints = [f"the stage began without {_listed(appeared)}: move the store out of the folder"] if appeared else []
    hints += [f"the stage began with {_listed(vanished)}: put the store back into the folder"] if vanished else []
    return f"{'; '.join(hints) or 'restore the mixture'}, or start a new run"


def _require_same_start(before: Mapping[str, Any], now: Mapping[str, Any], where: Place | str) -> None:
    """A folder may have moved; what has another path is compared by what it says about itself, if it can still be
    read."""
    if before["path"] == now["path"] or (before["path"] and now["path"] and {**before, "path": now["path"]} == now):
        return
    raise InputError(
        f"{where} was written by a run whose first weights were {before['path'] or 'random'}, this start names "
        f"{now['path'] or 'random ones'}; a run that goes on reads neither. Restore the setting, or start a "
        "new run (another --output)."
    )


def _require_equal(
    name: str, before: Mapping[str, Any], now: Mapping[str, Any], where: Place | str, hint: str = ""
) -> None:
    differing = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    if not differing:
        return
    more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
    one, other = ({key: each.get(key) for key in differing[:NAMED]} for each in (before, now))
    values = (
        (f"{name} = {one[name]}", f"{name} = {other[name]}")
        if [name] == differing
        else (f"{name} {one}", f"{name} {other}")
    )
    raise InputError(
        f"{where} was written by a run with {values[0]}, this run has {values[1]}{more}. Resuming would not "
        "continue it: "
        f"{hint or 'restore the setting, or start a new run'} (another --output)."
    )


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value
    )


def _names(stages: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(stage["name"] for stage in stages)


def _listed(tasks: Sequence[str]) -> str:
    return ", ".join([*tasks[:NAMED], *([f"{len(tasks) - NAMED} more"] if len(tasks) > NAMED else [])])
