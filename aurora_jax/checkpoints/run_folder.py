"""The checkpoints in a run's folder: which is sound, what is set aside, what a cut-off save has left.

OUTPUT/checkpoints/STEP    of the run, complete or not there at all
OUTPUT/stages/NAME         the weights at a stage's end
OUTPUT/set_aside/STEP      found damaged; kept for whoever wants to know, and read by nobody
"""

import re
from pathlib import Path

from aurora_jax.checkpoints import format
from aurora_jax.errors import InputError

CHECKPOINTS, STAGES, SET_ASIDE = "checkpoints", "stages", "set_aside"
UNFINISHED_FILE = re.compile(r"\..+-[0-9a-f]{8}")
"""What `storage.atomic.write_file` had not renamed."""


def step_folder(output: Path, step: int) -> Path:
    """The place of a checkpoint."""
    return output.absolute() / CHECKPOINTS / str(step)


def steps_in(output: Path) -> list[int]:
    """The steps that have a folder, whatever is in it; ascending."""
    folder = output.absolute() / CHECKPOINTS
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


def newest_step(output: Path) -> int | None:
    """The newest complete checkpoint of a run folder; what was being written when a process died does not count."""
    complete = (step for step in reversed(steps_in(output)) if format.is_checkpoint(step_folder(output, step)))
    return next(complete, None)


def newest_sound_step(output: Path) -> int | None:
    """The newest checkpoint that is complete and whose texts are what was written; damaged ones that are newer are set
    aside, and that is said. Its arrays are proved when they are read."""
    for step in reversed(steps_in(output)):
        if (problem := format.problem_of(step_folder(output, step))) is None:
            return step
        set_aside(output, step, problem)
    return None


def set_aside(output: Path, step: int, problem: str) -> Path:
    """Moves a damaged checkpoint out of the way; says where it is now, what is wrong, and what is there instead.

    Raises:
        InputError: it cannot be moved.
    """
    place = move_aside(output, step_folder(output, step), problem)
    older = [other for other in steps_in(output) if other < step]
    instead = f"the run looks at step {older[-1]} instead" if older else "there is no older one"
    print(f"{problem}; set aside as {place}; {instead}", flush=True)
    return place


def move_aside(output: Path, path: Path, problem: str) -> Path:
    """Moves a checkpoint of a run to where nobody reads it; its new place. Raises InputError, with the problem that led
    to it, if it cannot be moved."""
    folder = output.absolute() / SET_ASIDE
    names = (f"{path.name}{f'.{again}' if again else ''}" for again in range(10**6))
    try:
        folder.mkdir(exist_ok=True)
        place = next(place for name in names if not (place := folder / name).exists())
        path.rename(place)
    except OSError as error:
        raise InputError(f"{problem}. It cannot be moved to {folder}: {error}") from error
    return place


def remove_leftovers(output: Path) -> list[Path]:
    """Removes what saves that were cut off have left, of checkpoints, stages and small files; returns what that was.

    To be called by one process, while none saves.
    """
    output = output.absolute()
    removed = []
    for folder in (output, output / CHECKPOINTS, output / STAGES):
        for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
            if format.TEMPORARY in entry.name and entry.is_dir():
                format.absolute(entry).rmtree()
            elif UNFINISHED_FILE.fullmatch(entry.name) and entry.is_file():
                entry.unlink()
            else:
                continue
            removed.append(entry)
    return removed
