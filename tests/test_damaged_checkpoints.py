"""Damage of every kind, in every file of a checkpoint: a run goes on from the sound one before, or refuses; nothing
that was changed is ever restored or exported."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.checkpoints.metadata import CheckpointMetadata
from aurora_jax.checkpoints.run_folder import newest_step, steps_in
from aurora_jax.cli import main
from aurora_jax.data.batches.loader import DataStage
from aurora_jax.errors import Damaged, InputError
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.mesh import MeshConfig, make_mesh
from aurora_jax.train.checkpoint import RunCheckpoints, choose_start
from aurora_jax.train.config import CheckpointConfig, DataConfig, OptimizerConfig, TrainConfig
from aurora_jax.train.facts import run_facts
from aurora_jax.train.program import Program
from aurora_jax.train.stages import LearningRate, Stage
from aurora_jax.train.state import TrainState
from convert.__main__ import main as convert

MODEL = ModelConfig(vocabulary_size=96, max_positions=16, width=16, layers=2, heads=2, mlp_width=32)
FILES = {"tokenizer.json": b"{}", "LICENSE": b"free"}


def config_of(output: Path, **changes) -> TrainConfig:
    stage = Stage("cap", "nano_cap", steps=10, learning_rate=LearningRate(1e-3))
    data = DataConfig(corpus="unused", batch_size=8, sequence_length=16)
    compute = ComputeConfig("float32", "float32")
    return replace(TrainConfig(output, (stage,), data, model=MODEL, compute=compute), **changes)


def program_of(config: TrainConfig, devices: int = 1) -> Program:
    return Program(config, MODEL, make_mesh(MeshConfig(), jax.devices()[:devices]))


def checkpoints_of(config: TrainConfig) -> RunCheckpoints:
    facts = {**run_facts(config, [DataStage("cap", (("text", 1.0),), 10)], {}, {}), "stores": {"text": {}}}
    return RunCheckpoints(config, CheckpointMetadata(MODEL, "float32"), FILES, facts, "run")


def numbered(state: TrainState, step: int) -> TrainState:
    """Other values in every array, so that no two checkpoints have one in common."""
    changed = jax.tree.map(lambda leaf: leaf + jnp.asarray(step, leaf.dtype), state)
    return changed._replace(step=jnp.asarray(step, jnp.int32))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with the checkpoints of the steps 2 and 4."""
    config = config_of(tmp_path_factory.mktemp("run") / "run")
    checkpoints, state = checkpoints_of(config), program_of(config).random_state()
    for step in (2, 4):
        checkpoints.save(numbered(state, step), "cap")
    checkpoints.finish(numbered(state, 4), "cap")
    checkpoints.close()
    return config.output


@pytest.fixture(scope="module")
def states(run) -> dict[int, TrainState]:
    """What is in them."""
    config = config_of(run)
    return {step: jax.device_get(numbered(program_of(config).random_state(), step)) for step in (2, 4)}


def same(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(file.relative_to(checkpoint) for file in checkpoint.rglob("*") if file.is_file())


def outcome(run: Path, states: dict[int, TrainState]) -> str:
    """How a start of the run ends: "4" or "2", the checkpoint whose state it has to the bit; "refused"; "WRONG"."""
    config = config_of(run)
    try:
        start = choose_start(config)
        if start.path is None:
            return "refused"
        state = checkpoints_of(config).restore(program_of(config).shapes, int(start.path.name))
    except InputError:
        return "refused"
    return next((str(step) for step, there in states.items() if same(jax.device_get(state), there)), "WRONG")


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def flips(run: Path, count: int) -> list[tuple[Path, int]]:
    """Random bits of all files of the newest checkpoint, larger files not more often than small ones."""
    draw = random.Random(0)
    files = [file for file in files_of(run / "checkpoints" / "4") if (run / "checkpoints" / "4" / file).stat().st_size]
    chosen = [draw.choice(files) for _ in range(count)]
    return [(file, draw.randrange(8 * (run / "checkpoints" / "4" / file).stat().st_size)) for file in chosen]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> dict[str, bytes]:
    """What `to-torch` makes of the newest checkpoint."""
    folder = tmp_path_factory.mktemp("sound") / "export"
    assert convert(["to-torch", str(run / "checkpoints" / "4"), str(folder)]) == 0
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def require_no_silent_change(
    run: Path, states, exported, copy: Path, damage: Callable[[Path], None], said: str, capsys
) -> None:
    shutil.copytree(run, copy)
    damage(copy / "checkpoints" / "4")
    export = copy.with_name("export")
    if convert(["to-torch", str(copy / "checkpoints" / "4"), str(export)]) == 0:  # it did not read what is damaged
        assert contents(export) == exported, said
        shutil.rmtree(export)
    assert not export.exists()
    capsys.readouterr()
    found = outcome(copy, states)
    printed = capsys.readouterr().out
    assert found in ("2", "4"), f"{said}: {found}"
    if found == "2":
        assert "set aside as" in printed, said
        assert (copy / "set_aside" / "4").is_dir(), said
        assert "looks at step 2 instead" in printed, said
    shutil.rmtree(copy)


def test_what_is_sound_is_restored(run, states):
    assert outcome(run, states) == "4"
    assert steps_in(run) == [2, 4]


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.full)])
def test_a_flipped_bit_is_never_restored(run, states, exported, tmp_path, capsys, count):
    for file, bit in flips(run, count):
        said = f"bit {bit} of {file}"
        require_no_silent_change(
            run, states, exported, tmp_path / "r", lambda at, f=file, b=bit: flip(at / f, b), said, capsys
        )


@pytest.mark.parametrize("damage", ["emptied", "truncated", "removed"])
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.full)])
def test_a_file_that_is_cut_or_gone_is_never_read_as_another(run, states, exported, tmp_path, capsys, damage, every):
    change = {
        "emptied": lambda file: file.write_bytes(b""),
        "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "removed": Path.unlink,
    }[damage]
    for file in files_of(run / "checkpoints" / "4")[::every]:
        require_no_silent_change(
            run, states, exported, tmp_path / "r", lambda at, f=file: change(at / f), f"{file} {damage}", capsys
        )


def test_a_changed_weight_is_named(run, states, tmp_path, capsys):
    """One bit of one value, in a file that reads as well as before: nothing but the checksum can tell."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    weights = jax.tree.map(np.copy, states[4].parameters)
    weights["final_norm"]["bias"].view(np.uint32)[3] ^= 1 << 17
    item = copy / "checkpoints" / "4" / "params"
    shutil.rmtree(item)
    ocp.Checkpointer(ocp.StandardCheckpointHandler()).save(item, args=ocp.args.StandardSave(weights))
    assert main(["checkpoints", "verify", str(copy)]) == 2
    assert "final_norm.bias has the checksum" in capsys.readouterr().out
    for dtype in (None, "bfloat16"):
        with pytest.raises(Damaged, match=r"final_norm\.bias has the checksum"):
            restore_parameters(copy, dtype=dtype)
    assert convert(["to-torch", str(copy), str(tmp_path / "out")]) == 2
    assert "final_norm.bias" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert outcome(copy, states) == "2"


def test_when_none_is_sound_the_run_says_what_to_do(run, states, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for step in ("2", "4"):
        for chunk in (copy / "checkpoints" / step / "optimizer").rglob("d/*"):
            chunk.write_bytes(b"")
    config = config_of(copy)
    with pytest.raises(InputError, match=r"no sound checkpoint left.*set_aside.*--initial-checkpoint"):
        checkpoints_of(config).restore(program_of(config).shapes, 4)
    assert sorted(path.name for path in (copy / "set_aside").iterdir()) == ["2", "4"]


def test_moments_come_back_in_another_dtype(run, states, tmp_path, capsys):
    """fp32 to bf16 and back, weights untouched; that it is so is said."""
    half = config_of(run, optimizer=OptimizerConfig(moments_dtype="bfloat16"))
    state = checkpoints_of(half).restore(program_of(half).shapes, 4)
    assert same(jax.device_get(state.parameters), states[4].parameters)
    for found, there in zip(jax.tree.leaves(state.moments), jax.tree.leaves(states[4].moments), strict=True):
        assert found.dtype == (jnp.bfloat16 if there.dtype == np.float32 else there.dtype)
        np.testing.assert_array_equal(found, there.astype(found.dtype))
    there = config_of(tmp_path / "half", optimizer=half.optimizer)
    checkpoints = checkpoints_of(there)
    checkpoints.save(state, "cap")
    checkpoints.finish(state, "cap")
    checkpoints.close()
    whole = config_of(there.output)
    again = checkpoints_of(whole).restore(program_of(whole).shapes, 4)
    for found, before in zip(jax.tree.leaves(again.moments), jax.tree.leaves(state.moments), strict=True):
        np.testing.assert_array_equal(found, before.astype(found.dtype))


def test_what_a_cut_off_save_left_is_removed_and_what_is_kept_stays(run, tmp_path):
    config = config_of(tmp_path / "run", checkpoint=CheckpointConfig(every=1, keep=2, keep_every=3))
    checkpoints, state = checkpoints_of(config), program_of(config).random_state()
    for step in range(1, 9):
        checkpoints.save(numbered(state, step), "cap")
    checkpoints.finish(numbered(state, 8), "cap")
    checkpoints.close()
    assert steps_in(config.output) == [3, 6, 7, 8]
    assert newest_step(config.output) == 8


def test_a_save_that_outlasts_the_notice_of_a_preemption_is_said(tmp_path, capsys):
    for grace in (1e-6, 1e6):
        config = config_of(tmp_path / f"{grace}", checkpoint=CheckpointConfig(grace_seconds=grace, minutes=7))
        checkpoints, state = checkpoints_of(config), program_of(config).random_state()
        checkpoints.save(numbered(state, 1), "cap")
        checkpoints.finish(numbered(state, 1), "cap")
        for done in (1, 2):
            assert not checkpoints.due(done)
        checkpoints.close()
        assert capsys.readouterr().out.count("costs up to 7 minutes between two checkpoints") == (grace < 1)


def test_commands(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    flip(copy / "checkpoints" / "2" / "run" / "metadata", 8 * 20 + 1)
    assert main(["checkpoints", "ls", str(copy)]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert "checkpoints/4" in listed
    assert "damaged" in listed
    assert main(["checkpoints", "verify", str(copy)]) == 2
    assert main(["checkpoints", "verify", str(copy / "checkpoints" / "4")]) == 0
    printed = capsys.readouterr()
    assert "checkpoints/2: DAMAGED" in printed.out
    assert "checkpoints/4: sound" in printed.out
    assert "1 of 2 checkpoints are not sound" in printed.err
    assert main(["checkpoints", "lineage", str(copy)]) == 0
    assert "steps 1 to 4" in capsys.readouterr().out
    assert main(["checkpoints", "prune", str(copy)]) == 0
    assert steps_in(copy) == [2, 4]
    assert main(["checkpoints", "prune", str(copy), "--yes"]) == 0
    assert steps_in(copy) == [4]
    assert main(["checkpoints", "ls", str(tmp_path)]) == 2
    assert json.loads((copy / "checkpoints" / "4" / "run" / "metadata").read_text())["config"]["seed"] == 0
