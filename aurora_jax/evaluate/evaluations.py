"""The evaluations in a run's metrics.jsonl: which may be compared, and with what.

A row has {"step", "stage", "complete", "settings", "evaluation"}; `settings` are those of
`bits_per_byte.EvaluationSettings`, and rows of versions before 2026-11-25 have none. Those versions always let
documents attend to each other, and their quick evaluations read the first windows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from aurora_jax.errors import InputError

OF_ALL_TASKS = (
    "sequence_length",
    "attend_across_documents",
    "tokenizer_sha256",
    "compute_dtype",
    "activation_dtype",
    "windows",
)


def start_of(rows: Sequence[Mapping], *, complete: bool) -> Mapping | None:
    """The evaluation before the run's first step: of all held-out text, or the quick one; None if it is not there."""
    return next((row for row in rows if "evaluation" in row and row["step"] == 0 and row["complete"] == complete), None)


def differing_settings(one: Mapping, other: Mapping, task: str) -> dict[str, tuple]:
    """Settings by name in which two evaluations of a task differ, with both values; nothing else may be compared or
    share a curve."""
    first, second = one.get("settings"), other.get("settings")
    if one["complete"] != other["complete"]:
        return {"complete": (one["complete"], other["complete"])}
    if first is None or second is None:
        known = first or second
        same = first is second is None or (one["complete"] and known is not None and known["attend_across_documents"])
        return (
            {}
            if same
            else {"settings": tuple("not recorded" if each is None else "recorded" for each in (first, second))}
        )
    pairs = {name: (first[name], second[name]) for name in OF_ALL_TASKS} | {
        "text": (first["texts"].get(task), second["texts"].get(task))
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def change_since_start(start: Mapping, row: Mapping) -> dict[str, float]:
    """Relative change of the bits per byte of each task that was measured alike in both: -0.5 where the bits have
    halved."""
    return {
        task: score["bits_per_byte"] / start["evaluation"][task]["bits_per_byte"] - 1
        for task, score in row["evaluation"].items()
        if task in start["evaluation"] and not differing_settings(start, row, task)
    }


def settings_groups(rows: Sequence[Mapping], task: str) -> list[list[Mapping]]:
    """The evaluations of a task, parted into those that may share a curve, in order."""
    groups: list[list[Mapping]] = []
    for row in rows:
        if task in row["evaluation"]:
            group = next((group for group in groups if not differing_settings(group[0], row, task)), None)
            if group is None:
                groups.append(group := [])
            group.append(row)
    return groups


def described(row: Mapping) -> str:
    """How an evaluation was measured, for people."""
    settings = row.get("settings")
    text = "all held-out text" if row["complete"] else "some windows a task"
    if settings is None:
        return f"{text}; how it was measured was not recorded"
    text = text if row["complete"] else f"{settings['windows']} windows a task, the same ones each time"
    masks = "documents attend to each other" if settings["attend_across_documents"] else "documents isolated"
    return (
        f"{text}; windows of {settings['sequence_length']:,} tokens, {masks}; tokenizer "
        f"{settings['tokenizer_sha256'][:12]}; "
        f"products in {settings['compute_dtype']}, the rest in {settings['activation_dtype']}"
    )


KINDS = {
    "loss": "step",
    "left_out": "step",
    "samples": "samples after step",
    "goodput": "account of the time after step",
}
"""Of the rows of metrics.jsonl, by a key that only they have; the others are evaluations."""


def require_one_run(rows: Sequence[Mapping], path: Path) -> None:
    """Raises InputError unless the rows are those of one run: each step once, in order, and so its evaluations of
    either kind."""
    last: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        kind = next((kind for key, kind in KINDS.items() if key in row), "evaluation after step")
        if "evaluation" in row:
            kind = f"{'complete' if row['complete'] else 'quick'} {kind}"
        if row["step"] <= last.get(kind, -1):
            raise InputError(
                f"{path}, line {number}: {kind} {row['step']} comes after {last[kind]}: these are the rows of "
                "two runs, or of two "
                "processes that wrote at once. Keep those of one."
            )
        last[kind] = row["step"]
