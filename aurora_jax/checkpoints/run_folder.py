"""The checkpoints in a run's folder: which is sound, what is set aside, what a cut-off save has left.

OUTPUT/checkpoints/STEP    of the run, complete or not there at all
OUTPUT/stages/NAME         the weights at a stage's end
OUTPUT/set_aside/STEP      found damaged; kept for whoever wants to know, and read by nobody
"""

import re
from collections.abc import Iterator

from aurora_jax.checkpoints import format
from aurora_jax.storage.atomic import write_file
from aurora_jax.storage.places import Place, absolute, absolute_place, is_remote, move, refused_as, remove

CHECKPOINTS, STAGES, SET_ASIDE = "checkpoints", "stages", "set_aside"
UNFINISHED_FILE = re.compile(r"\..+-[0-9a-f]{8}")
"""What `storage.atomic.write_file` had not renamed."""


def step_folder(output: Place, step: int) -> Place:
    """The place of a checkpoint."""
    return absolute_place(output) / CHECKPOINTS / str(step)


def steps_in(output: Place) -> list[int]:
    """The steps that have a folder, whatever is in it; ascending."""
    folder = absolute_place(output) / CHECKPOINTS
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


def newest_step(output: Place) -> int | None:
    """The newest complete checkpoint of a run folder; what was being written when a process died does not count."""
    complete = (step for step in reversed(steps_in(output)) if format.is_checkpoint(step_folder(output, step)))
    return next(complete, None)


def newest_sound_step(output: Place) -> int | None:
    """The newest checkpoint that is complete and whose texts are what was written; damaged ones that are newer are set
    aside, and that is said. Its arrays are proved when they are read."""
    for step in reversed(steps_in(output)):
        if _is_cut_off(step_folder(output, step)):
            continue
        if (problem := format.problem_of(step_folder(output, step))) is None:
            return step
        set_aside(output, step, problem)
    return None


def set_aside(output: Place, step: int, problem: str) -> Place:
    """Moves a damaged checkpoint out of the way; says where it is now, what is wrong, and what is there instead.

    Raises:
        InputError: it cannot be moved.
    """
    place = move_aside(output, step_folder(output, step), problem)
    older = [other for other in steps_in(output) if other < step]
    instead = f"the run looks at step {older[-1]} instead" if older else "there is no older one"
    print(f"{problem}; set aside as {place}; {instead}", flush=True)
    return place


def move_aside(output: Place, path: Place, problem: str) -> Place:
    """Moves a checkpoint of a run to where nobody reads it; its new place. Raises InputError, with the problem that led
    to it, if it cannot be moved."""
    folder = absolute_place(output) / SET_ASIDE
    names = (f"{path.name}{f'.{again}' if again else ''}" for again in range(10**6))
    with refused_as(f"{problem}. It cannot be moved to {folder}"):
        folder.mkdir(exist_ok=True)
        place = next(place for name in names if not (place := folder / name).exists())
        # One that is cut off leaves a checkpoint that lacks something, and is moved again.
        move(path, place, last=(format.COMMIT_MARKER, format.COMMIT_MARK_IN_BUCKET))
    return place


def _is_cut_off(folder: Place) -> bool:
    """Is it what a save that was cut off has left, under a checkpoint's name?"""
    return is_remote(folder) and not format.is_committed(folder)


def _settle_bucket(output: Place) -> list[Place]:
    """Of removals that were cut off, too, something is left under a checkpoint's name: it goes, where a newer one is
    whole. What is whole but lacks Orbax's mark (a copy from a disk has none) gets it, since Orbax sees no others when
    it counts how many to keep."""
    newest, removed = newest_step(output) or 0, []
    for step in steps_in(output):
        folder = step_folder(output, step)
        if format.missing_items(absolute(folder)):
            if step < newest:
                remove(folder)
                removed.append(folder)
        elif not (mark := folder / format.COMMIT_MARK_IN_BUCKET).exists():
            write_file(mark, f"Checkpoint commit was successful to {folder}")
    return removed


def _entries(folder: Place) -> Iterator[Place]:
    yield from sorted(folder.iterdir()) if folder.is_dir() else ()


def remove_leftovers(output: Place) -> list[Place]:
    """Removes what saves that were cut off have left, of checkpoints, stages and small files; returns what that was.

    To be called by one process, while none saves.
    """
    output = absolute_place(output)
    removed = []
    for folder in (output, output / CHECKPOINTS, output / STAGES):
        for entry in _entries(folder):
            if entry.is_dir() and (format.TEMPORARY in entry.name or (folder != output and _is_cut_off(entry))):
                remove(entry)
            elif UNFINISHED_FILE.fullmatch(entry.name) and entry.is_file():
                entry.unlink()
            else:
                continue
            removed.append(entry)
    return removed + (_settle_bucket(output) if is_remote(output) else [])
