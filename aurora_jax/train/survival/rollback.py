"""Back to before a run diverged, and on without the batches that did it: `--rollback K`.

The steps are counted as ever and their batches are not trained on, so that every other step has the batch and the
learning rate that it always had. OUTPUT/left_out.json lists them; so do the facts in every later checkpoint.
"""

import json

from aurora_jax.checkpoints import format, run_folder
from aurora_jax.errors import InputError
from aurora_jax.storage.atomic import write_file
from aurora_jax.storage.places import Place
from aurora_jax.storage.records import object_in
from aurora_jax.train.config import TrainConfig
from aurora_jax.train.facts import LEFT_OUT
from aurora_jax.train.processes import is_first, wait_for_all
from aurora_jax.train.survival import diagnosis

NEWER = "The run is rolled back to before a checkpoint"


def roll_back(config: TrainConfig) -> list[list[int]]:
    """Sets aside what is newer than the checkpoint to go back to, if the run has diverged and is told to.

    Returns:
        First and last step of every range whose batches are left out, from this and earlier rollbacks.

    Raises:
        InputError: there is no checkpoint so far back; nothing has been moved.
    """
    found = config.output / diagnosis.NAME
    if is_first() and config.rollback and found.exists():
        _roll_back(config, found)
    wait_for_all("rolled back")
    return _left_out(config.output)


def _roll_back(config: TrainConfig, found: Place) -> None:
    said = object_in(found.read_bytes(), found)
    first, last = int(said["first"]), int(said["last"])
    before = [step for step in run_folder.steps_in(config.output) if step <= first]
    sound = [step for step in before if format.is_checkpoint(run_folder.step_folder(config.output, step))]
    if len(sound) < config.rollback:
        raise InputError(
            f"--rollback {config.rollback}: before step {first}, at which {found} begins, {config.output} has "
            f"{len(sound)} checkpoints ({', '.join(map(str, sound)) or 'none'})."
        )
    target, left_out = sound[-config.rollback], _left_out(config.output)
    if [first, last] not in left_out:  # as it is where this was cut off
        write_file(config.output / f"{LEFT_OUT}.json", json.dumps([*left_out, [first, last]]) + "\n")
    for step in run_folder.steps_in(config.output):
        if step > target:
            run_folder.move_aside(config.output, run_folder.step_folder(config.output, step), NEWER)
    stages = config.output / run_folder.STAGES
    for stage in sorted(stages.iterdir()) if stages.is_dir() else ():
        if format.is_checkpoint(stage) and format.read_metadata(stage).step > target:
            run_folder.move_aside(config.output, stage, NEWER)
    write_file(found.with_name(f"diagnosis-{first}-{last}.json"), found.read_bytes())
    found.unlink()
    print(
        f"rolled back to step {target}; the batches of the steps {first} to {last} are left out; what was newer is in "
        f"{config.output / run_folder.SET_ASIDE}",
        flush=True,
    )


def _left_out(output: Place) -> list[list[int]]:
    path = output / f"{LEFT_OUT}.json"
    return json.loads(path.read_text()) if path.exists() else []
