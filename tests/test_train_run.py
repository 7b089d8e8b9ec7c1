"""Whole runs: what a stop, a kill or another setting does to them. Undisturbed runs are the reference, bit for bit."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import run_on_eight_devices
from resealing import as_format_1, reseal
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # TensorBoard's own

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.checkpoints import provenance
from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.checkpoints.metadata import CheckpointMetadata
from aurora_jax.checkpoints.run_folder import newest_step
from aurora_jax.checkpoints.writing import save_checkpoint
from aurora_jax.data.batches.loader import Loader
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.data.registry.tasks import mixture_rates
from aurora_jax.errors import InputError
from aurora_jax.evaluate.eval_command import EvalCommand
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.launch.progress import ITEMS, Newest, newest_checkpoint
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.decoder import initial_parameters, merge, structure_of
from aurora_jax.train import checkpoint as checkpoint_of_run
from aurora_jax.train.checkpoint import choose_start
from aurora_jax.train.config import CheckpointConfig, DataConfig, EvaluationConfig, OptimizerConfig, TrainConfig
from aurora_jax.train.facts import require_same_run
from aurora_jax.train.loop import Diverged, train
from aurora_jax.train.program import Program
from aurora_jax.train.stages import LearningRate, Stage
from convert.__main__ import main as convert

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(vocabulary_size=400, max_positions=32, width=16, layers=2, heads=2, mlp_width=24)
STAGES = (
    Stage("cap", "nano_cap", 7, LearningRate(peak=1e-2, warmup_steps=2, decay_steps=10)),
    Stage("cat", "nano_cat", 5),
)


@pytest.fixture(scope="module")
def base(mini_corpus, mini_tokenizer, tmp_path_factory):
    """A config for 12 steps in two stages; the token stores are shared by all runs of this file."""
    folder = tmp_path_factory.mktemp("runs")
    return TrainConfig(
        output=folder / "undisturbed",
        stages=STAGES,
        model=MODEL,
        data=DataConfig(
            corpus=str(mini_corpus),
            tokenizer=mini_tokenizer,
            stores=str(folder / "stores"),
            batch_size=8,
            sequence_length=32,
        ),
        compute=ComputeConfig("float32", "float32"),
        evaluation=EvaluationConfig(tasks=("sample_en", "sample_fi"), every=4, quick_windows=2, batch_size=2),
        checkpoint=CheckpointConfig(every=4),
        log_format="lines",
    )


@pytest.fixture(scope="module")
def undisturbed(base):
    """The reference run and its last state."""
    return base.output, train(base)


def losses(run: Path) -> dict[int, tuple]:
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(len(rows)))  # each step once, in order
    return {
        row["step"]: (row["loss"], row["gradient_norm"], row["learning_rate"], tuple(row["task_loss"].items()))
        for row in rows
    }


def evaluations(run: Path) -> dict[tuple, dict]:
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "evaluation" in row]
    return {(row["step"], row["complete"]): row["evaluation"] for row in rows}


def assert_same_state(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stop_after", [5, 7, 8])
def test_a_stopped_run_goes_on_bit_for_bit(base, undisturbed, tmp_path, stop_after):
    """Stopped inside a stage, at a stage's end, and at a checkpoint."""
    config = replace(base, output=tmp_path / "run")
    train(replace(config, stop_after=stop_after))
    assert len(losses(config.output)) == stop_after
    if (
        stop_after != 5
    ):  # as a kill would: the evaluation that follows the checkpoint (the complete one, at a stage's end) is cut off
        lines = (config.output / "metrics.jsonl").read_text().splitlines(keepends=True)
        (config.output / "metrics.jsonl").write_text("".join(lines[:-2]))  # with the account of the time behind it
    state = train(config)
    assert_same_state(state, undisturbed[1])
    assert losses(config.output) == losses(undisturbed[0])
    assert evaluations(config.output) == evaluations(undisturbed[0])
    assert {step for step, is_complete in evaluations(config.output) if is_complete} == {0, 7, 12}
    assert {step for step, is_complete in evaluations(config.output) if not is_complete} == {
        0,
        4,
        7,
        8,
        12,
    }  # one curve, from the start


def test_dropout_and_micro_batches_resume_bit_for_bit(base, tmp_path):
    config = replace(
        base, output=tmp_path / "whole", dropout=0.2, optimizer=OptimizerConfig(micro_batches=2), stages=STAGES[:1]
    )
    whole = train(config)
    config = replace(config, output=tmp_path / "parts")
    train(replace(config, stop_after=3))
    assert_same_state(train(config), whole)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_it_learns(undisturbed):
    found = losses(undisturbed[0])
    assert found[11][0] < found[0][0] - 0.5
    before, after = evaluations(undisturbed[0])[0, True], evaluations(undisturbed[0])[12, True]
    assert all(after[task]["bits_per_byte"] < before[task]["bits_per_byte"] for task in before)


def test_every_figure_says_how_it_was_measured(base, undisturbed):
    rows = [row for row in read_metrics(undisturbed[0] / "metrics.jsonl") if "evaluation" in row]
    for row in rows:
        settings = row["settings"]
        assert (settings["sequence_length"], settings["attend_across_documents"]) == (32, True)
        assert (settings["compute_dtype"], settings["activation_dtype"]) == ("float32", "float32")
        assert settings["tokenizer_sha256"] == checkpoint.read_metadata(undisturbed[0]).tokenizer_sha256
        assert settings["windows"] == (None if row["complete"] else 2)
        for task, score in row["evaluation"].items():
            tokens = len(TokenStore.open(f"{base.data.stores}/{task}/validation"))
            assert score["windows"] == (-(-(tokens - 1) // 32) if row["complete"] else 2)
        assert set(settings["texts"]) == set(row["evaluation"])


def test_stages_are_kept_with_their_lineage(base, undisturbed, tmp_path):
    run, state = undisturbed
    assert [entry["stage"] for entry in checkpoint.read_metadata(run / "stages" / "cat").lineage] == ["cap", "cat"]
    assert checkpoint.read_metadata(run / "stages" / "cap").step == 7
    assert_same_state(restore_parameters(run / "stages" / "cat"), state.parameters)
    assert checkpoint.resolve(run).name == "12"
    # A run that died between its checkpoint and the stage's makes it up.
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stages" / "cat")
    train(replace(base, output=tmp_path / "run"))
    assert_same_state(restore_parameters(tmp_path / "run" / "stages" / "cat"), state.parameters)


def test_bloom_goes_in_learns_and_comes_out(base, mini_tokenizer, tmp_path):
    """PyTorch's BLOOM, two stages with a stop between, on sequences twice as long as its config says,
    PyTorch's BLOOM again."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 416,
        "hidden_size": 18,
        "n_layer": 2,
        "n_head": 3,
        "seq_length": 16,
    }  # more rows than the tokenizer has ids
    transformers.BloomForCausalLM(transformers.BloomConfig(**sizes)).save_pretrained(tmp_path / "hf")
    shutil.copytree(mini_tokenizer, tmp_path / "hf", dirs_exist_ok=True)
    assert convert(["from-torch", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0

    data = replace(base.data, tokenizer=None, attend_across_documents=False)
    config = replace(base, output=tmp_path / "run", model=None, initial_checkpoint=tmp_path / "ours", data=data)
    train(replace(config, stop_after=8))
    state = train(config)
    found = losses(tmp_path / "run")
    assert len(found) == 12
    assert found[11][0] < found[0][0] - 0.5

    # `aurora eval` reads the tasks, windows and masks of the run, from a stage as from a step, and finds the run's
    # own figures.
    stores = {"corpus": base.data.corpus, "stores": base.data.stores}
    for where in ("run", "run/stages/cat"):
        EvalCommand(tmp_path / where, **stores, json=tmp_path / "eval.json", compute=base.compute).run()
        found = json.loads((tmp_path / "eval.json").read_text())
        (row,) = [
            row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row.get("complete") and row["step"] == 12
        ]
        assert found["settings"] == row["settings"]
        assert tuple(found["evaluation"]) == base.evaluation.tasks
        assert (row["settings"]["sequence_length"], row["settings"]["attend_across_documents"]) == (32, False)
        for task, score in row["evaluation"].items():
            assert found["evaluation"][task] == pytest.approx(score, rel=1e-5)

    assert convert(["to-torch", str(tmp_path / "run" / "stages" / "cat"), str(tmp_path / "back")]) == 0
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert isinstance(model, transformers.BloomForCausalLM)
    assert not any(report.values()), report
    tokens = np.random.default_rng(0).integers(416, size=(2, 40))
    decoder = merge(structure_of(checkpoint.read_metadata(tmp_path / "run").config, base.compute), state.parameters)
    with torch.inference_mode():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(decoder.logits(decoder(jnp.asarray(tokens))), expected, atol=1e-4, rtol=0)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (mini_tokenizer / "tokenizer.json").read_bytes()


def config_file(base: TrainConfig, folder: Path) -> Path:
    """The base config as a file, for a process of its own."""
    path = folder / "config.py"
    path.write_text(
        "from pathlib import Path, PosixPath\n"
        "from aurora_jax.model.config import *\nfrom aurora_jax.train.config import *\nfrom "
        "aurora_jax.train.stages import *\n"
        f"def config():\n    return {replace(base, output=folder / 'run')!r}\n"
    )
    return path


def start(path: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "aurora_jax", "train", str(path)], cwd=ROOT, env=environment)


def wait_for(process: subprocess.Popen, condition) -> None:
    while not condition():
        assert process.poll() is None, "the process ended before what was waited for"
        time.sleep(0.01)


def steps_recorded(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"gradient_norm"') if path.is_file() else 0


def test_a_killed_process_goes_on_bit_for_bit(base, undisturbed, tmp_path):
    path, run = config_file(base, tmp_path), tmp_path / "run"
    process = start(path)
    wait_for(process, lambda: (newest_step(run) or 0) >= 4 and steps_recorded(run) >= 6)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert steps_recorded(run) < 12 or newest_step(run) < 12
    process = start(path)
    assert process.wait() == 0
    assert losses(run) == losses(undisturbed[0])
    assert_same_state(restore_parameters(run), undisturbed[1].parameters)


def test_sigterm_writes_a_checkpoint_and_ends_well(base, undisturbed, tmp_path):
    path, run = config_file(replace(base, checkpoint=CheckpointConfig(every=1000)), tmp_path), tmp_path / "run"
    process = start(path)
    wait_for(process, lambda: steps_recorded(run) >= 2)
    process.terminate()
    assert process.wait() == 143  # not 0, which would say that the run is done
    stopped = newest_step(run)
    assert stopped is not None
    assert stopped == len(losses(run))
    assert start(path).wait() == 0
    assert losses(run) == losses(undisturbed[0])


def test_the_order_in_which_a_run_looks_for_its_state(base, undisturbed, tmp_path):
    converted = tmp_path / "converted"
    metadata = CheckpointMetadata(MODEL, "float32")
    save_checkpoint(converted, initial_parameters(MODEL, 5), metadata, checkpoint.read_files(undisturbed[0]))
    fresh = replace(base, output=tmp_path / "run", model=None, initial_checkpoint=converted)
    assert choose_start(replace(base, output=tmp_path / "run")).kind == "random"
    assert (choose_start(fresh).kind, choose_start(fresh).path) == ("checkpoint", converted)
    state = train(replace(fresh, stop_after=1))
    assert int(state.moments[0].count) == 1  # a fresh optimizer
    found = choose_start(fresh)
    assert (found.kind, found.path) == ("resume", tmp_path / "run" / "checkpoints" / "1")
    # What was being written when the process died does not count.
    for step, item in (("9", "params"), ("8.orbax-checkpoint-tmp-0", "metadata")):
        (tmp_path / "run" / "checkpoints" / step / item).mkdir(parents=True)
    assert newest_step(tmp_path / "run") == 1
    with pytest.raises(InputError, match="nowhere"):
        choose_start(replace(fresh, output=tmp_path / "new", initial_checkpoint=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed = 0.*seed = 1"),
        ({"optimizer": OptimizerConfig(beta1=0.5)}, "0.9.*0.5"),
        ({"stages": (replace(STAGES[0], steps=6), STAGES[1])}, "'steps': 7.*'steps': 6"),
        ({"stages": STAGES[:1]}, "stages"),
        ({"model": replace(MODEL, width=32)}, "width = 16.*width = 32"),
    ],
    ids=["seed", "beta", "steps", "fewer-stages", "model"],
)
def test_another_run_is_not_resumed(base, undisturbed, change, said):
    with pytest.raises(InputError, match=said):
        train(replace(base, **change))


def test_another_batch_size_is_not_resumed(base, undisturbed):
    with pytest.raises(InputError, match=r"batch_size = 8.*batch_size = 4"):
        train(replace(base, data=replace(base.data, batch_size=4)))


def copied(run: Path, to: Path, *, without: str = "") -> Path:
    shutil.copytree(run, to)
    if without:
        shutil.rmtree(to / without)
    return to


def edit_facts(item: Path, change) -> None:
    """Changes the facts that a checkpoint carries."""
    facts = json.loads((item / "run" / "metadata").read_text())
    change(facts)
    (item / "run" / "metadata").write_text(json.dumps(facts))
    reseal(item)


def swapped(mixture: str) -> tuple[tuple[str, float], ...]:
    """English and Finnish at each other's rates."""
    rates = dict(mixture_rates(mixture))
    if mixture == "nano_cap":
        rates["sample_en"], rates["sample_fi"] = rates["sample_fi"], rates["sample_en"]
    return tuple(rates.items())


def test_other_rates_under_the_same_name_are_not_resumed(base, undisturbed, monkeypatch):
    monkeypatch.setattr("aurora_jax.data.registry.tasks.mixture_rates", swapped)
    with pytest.raises(
        InputError,
        match=r"rates of stage cap \{'sample_en': 0.28, 'sample_fi': 0.12\}.*\{'sample_en': 0.12, 'sample_fi': 0.28",
    ):
        train(base)


def test_a_store_that_appears_or_vanishes_is_not_resumed(base, undisturbed, tmp_path):
    """With --data.skip-missing it changes the others' rates, and what "consumed" means."""
    run = copied(undisturbed[0], tmp_path / "run")

    def without_hindi(facts):
        for stage in facts["stages"][:1]:
            stage["rates"].pop("sample_hi", None)
        facts["stores"].pop("sample_hi", None)

    edit_facts(run / "checkpoints" / "12", without_hindi)
    with pytest.raises(
        InputError, match=r"rates of stage cap.*'sample_hi': 0.12.*began without sample_hi: move the store out"
    ):
        train(replace(base, output=run))
    stores = shutil.copytree(base.data.stores, tmp_path / "stores")
    shutil.rmtree(stores / "sample_hi" / "train")
    data = replace(base.data, stores=str(stores), skip_missing=True)
    with pytest.raises(
        InputError, match=r"rates of stage cap.*'sample_hi': 0.12.*began with sample_hi: put the store back"
    ):
        train(replace(base, data=data))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("stores", "sample_fi", "tokens"), 9, "the store of sample_fi {'tokens': 9}"),
        (("stores", "sample_fi", "sources"), "x", "the store of sample_fi {'sources': 'x'}"),
        (("held_out", "sample_fi", "sources"), "x", "the held-out text of sample_fi {'sources': 'x'}"),
        (("precision", "compute_dtype"), "bfloat16", "precision {'compute_dtype': 'bfloat16'}"),
        (("initial", "path"), "/elsewhere", "first weights were /elsewhere"),
        (("stages", 0, "block_size"), 512, "stage cap {'block_size': 512}"),
    ],
)
def test_what_batches_updates_and_figures_follow_from_is_a_fact(base, undisturbed, tmp_path, path, value, said):
    """The facts are changed in the checkpoint; so would be the data, the precision and the start in the run."""
    run = copied(undisturbed[0], tmp_path / "run")

    def change(facts):
        *parents, last = path
        for name in parents:
            facts = facts[name]
        facts[last] = value

    edit_facts(run / "checkpoints" / "12", change)
    with pytest.raises(InputError, match=re.escape(said)):
        train(replace(base, output=run))


def test_a_stage_that_has_not_begun_may_change(undisturbed):
    facts = checkpoint.read_run(undisturbed[0])
    cap, cat = facts["stages"]
    other = {**facts, "stages": [cap, {**cat, "steps": 9, "mixture": "nano_base", "rates": {"sample_en": 1.0}}]}
    other["stores"] = {task: store for task, store in facts["stores"].items() if "clean" not in task}
    assert require_same_run(facts, other, "here", step=7) == []
    assert require_same_run(facts, {**other, "stages": [cap]}, "here", step=7) == []
    with pytest.raises(InputError, match=r"stage cat.*'nano_cat'.*'nano_base'"):
        require_same_run(facts, other, "here", step=8)


def test_other_micro_batches_go_on_with_the_run(base, undisturbed, tmp_path, capsys):
    """The update is the same up to rounding; it is said."""
    run = copied(undisturbed[0], tmp_path / "run", without="checkpoints/12")
    train(replace(base, output=run, optimizer=OptimizerConfig(micro_batches=4)))
    assert "micro_batches 1 -> 4" in capsys.readouterr().out
    found, expected = (np.array([row[:2] for row in losses(each).values()]) for each in (run, undisturbed[0]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (found[:8] == expected[:8]).all()
    assert not (found[8:] == expected[8:]).all()  # otherwise they were not in parts


def test_a_checkpoint_of_an_earlier_version_goes_on(base, undisturbed, tmp_path, capsys):
    """It has micro-batches among the optimizer's facts, and neither rates nor sizes; that they cannot be compared is
    said once."""
    run = copied(undisturbed[0], tmp_path / "run", without="checkpoints/12")

    def as_it_was(facts):
        for stage in facts["stages"]:
            del stage["rates"], stage["block_size"]
        facts["data"] = {task: store["fingerprint"] for task, store in facts.pop("stores").items()}
        facts["optimizer"]["micro_batches"] = 2
        for name in ("held_out", "precision", "initial", "layout", "run"):
            del facts[name]

    edit_facts(run / "checkpoints" / "8", as_it_was)
    as_format_1(run / "checkpoints" / "8")
    for stage in ("cap", "cat"):  # these had no facts at all
        shutil.rmtree(run / "stages" / stage / "run")
        as_format_1(run / "stages" / stage)
    assert_same_state(train(replace(base, output=run)), undisturbed[1])
    assert capsys.readouterr().out.count("recorded neither rates nor sizes") == 1
    train(replace(base, output=run))
    assert "recorded neither" not in capsys.readouterr().out


def test_what_an_earlier_run_has_left_is_neither_taken_nor_overwritten(base, undisturbed, tmp_path):
    run = copied(undisturbed[0], tmp_path / "run", without="checkpoints")
    config = replace(base, output=run)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"cap \(step 7\), cat \(step 12\) of an earlier run.*mv "):
        train(config)
    shutil.rmtree(run / "stages")
    with pytest.raises(InputError, match=r"12 steps of an earlier run.*seed = 0.*seed = 1.*mv "):
        train(replace(config, seed=1))
    (run / "run.json").rename(tmp_path / "run.json")
    with pytest.raises(InputError, match=r"12 steps of an earlier run.*which run it was"):
        train(config)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert not (run / "checkpoints").exists()

    # The same run may have died before its first checkpoint: it begins again, and no curve has two runs on it.
    (tmp_path / "run.json").rename(run / "run.json")
    train(replace(config, stop_after=1))
    assert list(losses(run)) == [0]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Tensors("train/loss")] == [0]
    assert [event.step for event in events.Tensors("bits_per_byte/sample_fi")] == [0]


def test_a_stage_of_another_run_is_not_taken_for_this_ones(base, undisturbed, tmp_path):
    run = copied(undisturbed[0], tmp_path / "run", without="checkpoints/12")
    edit_facts(run / "stages" / "cat", lambda facts: facts.update(run="another"))
    with pytest.raises(InputError, match=r"stages/cat was written by another run.*'another'.*mv "):
        train(replace(base, output=run))


def test_a_stage_may_be_appended(base, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    more = Stage("more", "nano_base", 2, LearningRate(peak=1e-3))
    state = train(replace(base, output=tmp_path / "run", stages=(*STAGES, more)))
    assert int(state.step) == 14
    assert losses(tmp_path / "run")[11] == losses(undisturbed[0])[11]


def test_a_run_whose_every_update_is_skipped_is_called_diverged(base, undisturbed, tmp_path):
    broken = initial_parameters(MODEL, 0)
    broken["final_norm"]["scale"] = jnp.full(16, jnp.nan)
    metadata = CheckpointMetadata(MODEL, "float32")
    save_checkpoint(tmp_path / "broken", broken, metadata, checkpoint.read_files(undisturbed[0]))
    evaluation = replace(base.evaluation, tasks=())
    with pytest.raises(Diverged, match="steps 0 to 2"):
        train(
            replace(
                base,
                output=tmp_path / "run",
                model=None,
                initial_checkpoint=tmp_path / "broken",
                evaluation=evaluation,
                optimizer=OptimizerConfig(most_skipped=3),
            )
        )


def poisoned(monkeypatch, steps) -> None:
    """Batches of these steps have a loss that is not finite."""
    batch = Loader.batch

    def poisoned_batch(loader, step, rows=None):
        made = batch(loader, step, rows)
        return made._replace(loss_weights_BL=made.loss_weights_BL * np.float32(np.inf)) if step in steps else made

    monkeypatch.setattr(Loader, "batch", poisoned_batch)


def test_a_diverged_run_is_diagnosed_and_rolled_back(base, undisturbed, tmp_path, monkeypatch, capsys):
    """Updates of three batches in a row are not finite. Without them the run goes on, from before them, as if it had
    only counted these steps."""
    poisoned(monkeypatch, range(5, 8))
    run = tmp_path / "run"
    optimizer = OptimizerConfig(most_skipped=3)
    config = replace(base, output=run, optimizer=optimizer, checkpoint=CheckpointConfig(every=2, keep=4))
    for _ in range(2):  # starting again ends in the same way
        with pytest.raises(Diverged, match=r"steps 5 to 7.*diagnosis\.json.*--rollback 1"):
            train(config)
    found = json.loads((run / "diagnosis.json").read_text())
    assert (found["first"], found["last"]) == (5, 7)
    assert [row["step"] for row in found["steps"]] == [7]  # of the second start, from the stage's end
    assert {len(row["batch"]) for row in found["steps"]} == {8}
    assert all(place["task"].startswith("sample_") for row in found["steps"] for place in row["batch"])
    assert len(found["norms"]["parameters.layers.mlp.up.kernel"]) == MODEL.layers
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "texts" in row] == [5, 6, 7]
    with pytest.raises(InputError, match=r"--rollback 9: before step 5.*has 2 checkpoints \(2, 4\)"):
        train(replace(config, rollback=9))
    state = train(replace(config, rollback=2))
    assert "rolled back to step 2; the batches of the steps 5 to 7 are left out" in capsys.readouterr().out
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row or "left_out" in row]
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["step"] for row in rows if "left_out" in row] == [5, 6, 7]
    assert not (run / "diagnosis.json").exists()
    assert sorted(path.name for path in (run / "set_aside").iterdir()) == ["4", "6", "7", "cap"]
    assert int(state.step) == 12
    assert int(state.accepted) == 9
    assert losses(undisturbed[0])[4][0] == rows[4]["loss"]
    assert checkpoint.read_run(run)["left_out"] == [[5, 7]]
    assert_same_state(train(replace(config, rollback=2)), state)  # no second time
    (run / "left_out.json").unlink()
    with pytest.raises(InputError, match=r"left out the batches of the steps \[\[5, 7\]\]"):
        train(config)


def test_a_sequence_beyond_the_positions_is_refused(base, tmp_path):
    with pytest.raises(InputError, match=r"33.*32 positions"):
        train(replace(base, output=tmp_path / "run", data=replace(base.data, sequence_length=33)))


def test_a_mesh_that_does_not_fit_is_refused(base, tmp_path):
    with pytest.raises(InputError, match="1 devices"):
        train(replace(base, output=tmp_path / "run", mesh=replace(base.mesh, tensor=2)))


EIGHT_DEVICES = """
import sys
from dataclasses import replace
import jax
from aurora_jax.cli import load_config
from aurora_jax.train.program import Program
from aurora_jax.train.config import MeshConfig
from aurora_jax.train.loop import train
from aurora_jax.model.mesh import make_mesh
from pathlib import Path

def assert_placed(state):
    for array, shape in zip(jax.tree.leaves(state), jax.tree.leaves(program.shapes), strict=True):
        assert array.sharding.is_equivalent_to(shape.sharding, array.ndim), (array.shape, array.sharding)

jax.config.update("jax_log_compiles", True)
base = load_config(Path(sys.argv[1]))
for mesh in sys.argv[3:]:
    data, fsdp, tensor = map(int, mesh.split("-"))
    output = Path(sys.argv[2]) / mesh
    config = replace(base, output=output, stop_after=3, mesh=MeshConfig(data, fsdp, 1, 1, tensor))
    program = Program(config, base.model, make_mesh(config.mesh))
    random = program.random_state()
    assert_placed(random)
    assert_placed(program.state_around(random.parameters))
    if tensor == 2:  # begun on another mesh, with another number of micro-batches
        train(replace(config, stop_after=2, mesh=MeshConfig(1, 4, 1, 1, 2), optimizer=replace(base.optimizer,
        micro_batches=2)))
    state = train(config)
    assert_placed(state)
    kernel = state.parameters["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16 // fsdp, 24 // tensor), kernel.sharding
    assert state.moments[0].mu["layers"]["mlp"]["up"]["kernel"].sharding == kernel.sharding
"""


def test_a_resumed_run_makes_no_weights(base, undisturbed, tmp_path, monkeypatch):
    """It reads the state in parts; random weights, or a second copy, would not fit beside it at full size."""
    config = replace(base, output=tmp_path / "run")
    train(replace(config, stop_after=11))
    for name in ("random_state", "state_around"):
        monkeypatch.delattr(Program, name)
    assert_same_state(train(config), undisturbed[1])


@pytest.mark.parametrize("meshes", [("2-2-2",), pytest.param(("1-8-1", "8-1-1"), marks=pytest.mark.full)])
def test_eight_devices_give_the_losses_of_one(base, undisturbed, tmp_path, meshes):
    path = config_file(replace(base, evaluation=replace(base.evaluation, tasks=())), tmp_path)
    done = run_on_eight_devices(EIGHT_DEVICES, path, tmp_path, *meshes)
    assert done.returncode == 0, done.stderr[-3000:]
    # Each mesh, and the run that is resumed: a state that came out elsewhere than it went in would be compiled for
    # again.
    assert done.stderr.count("Finished XLA compilation of jit(train_step)") == 2
    expected = [row[:2] for row in losses(undisturbed[0]).values()][:3]
    for mesh in meshes:
        found = [row[:2] for row in losses(tmp_path / mesh).values()]
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=mesh)


def test_metrics_file_is_json_lines(undisturbed):
    for line in (undisturbed[0] / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert list((undisturbed[0] / "tensorboard").glob("events*"))


def test_the_launcher_reads_the_newest_checkpoint_and_the_code_that_wrote_it(base, tmp_path, monkeypatch):
    """By itself, in the standard library, what the checkpoint format and Orbax say."""
    commit = tmp_path / "COMMIT"
    commit.write_text("0123456789abcdef0123456789abcdef01234567\n")
    monkeypatch.setattr(provenance, "COMMIT", commit)
    run = tmp_path / "run"
    assert newest_checkpoint(str(run)) == Newest(None)
    train(replace(base, output=run, stop_after=1))
    assert newest_checkpoint(str(run)) == Newest(1, commit.read_text().strip())
    for item in ITEMS:
        damaged = run / "checkpoints" / "2"
        shutil.copytree(run / "checkpoints" / "1", damaged)
        assert newest_checkpoint(str(run)).step == newest_step(run) == 2
        shutil.rmtree(damaged / item) if (damaged / item).is_dir() else (damaged / item).unlink()
        assert newest_checkpoint(str(run)).step == newest_step(run) == 1
        shutil.rmtree(damaged)
    commit.write_text("another\n")
    train(replace(base, output=run, stop_after=2))  # with other code it goes on
    assert newest_checkpoint(str(run)) == Newest(2, "another")


def test_goodput_adds_up_over_starts(base, tmp_path):
    """Of a run that was killed: what its starts say of their time is the time that has passed, and what was done twice
    counts once."""
    path, run = config_file(replace(base, checkpoint=CheckpointConfig(every=4)), tmp_path), tmp_path / "run"
    begun = time.time()
    process = start(path)
    wait_for(process, lambda: (newest_step(run) or 0) >= 4 and steps_recorded(run) >= 6)
    process.kill()
    process.wait()
    assert start(path).wait() == 0
    values = json.loads((run / "goodput.json").read_text())
    seconds = values["seconds"]
    assert values["starts"] == 2
    assert all(spent >= 0 for spent in seconds.values())
    assert sum(seconds.values()) == pytest.approx(values["last_sign"] - values["since"], abs=0.5)
    assert begun < values["since"] < values["last_sign"] < time.time()
    assert values["goodput"] == pytest.approx(seconds["steps"] / sum(seconds.values()))
    assert seconds["down"] > 0
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "goodput" in row]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert rows[-1]["epochs"]["sample_fi"] > rows[0]["epochs"]["sample_fi"] > 0


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.full)])
def test_a_run_that_is_killed_at_random_is_the_undisturbed_one(base, undisturbed, tmp_path, kills):
    """SIGKILL at random moments, during saves too: the same losses and parameters to the bit, each step once."""
    config = replace(base, checkpoint=CheckpointConfig(every=1, keep=2))
    path, run = config_file(config, tmp_path), tmp_path / "run"
    draw = random.Random(kills)
    for kill in range(kills):
        process = start(path)
        wanted = min(11, (newest_step(run) or 0) + draw.randint(0, 1 + 12 // kills))
        while process.poll() is None and (newest_step(run) or 0) < wanted:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.3)
        process.kill()
        process.wait()
        if kill % 2:  # what a save that was cut off leaves
            (run / "checkpoints" / f"{99 + kill}.orbax-checkpoint-tmp-7").mkdir(parents=True, exist_ok=True)
    assert start(path).wait() == 0
    assert losses(run) == losses(undisturbed[0])
    assert_same_state(restore_parameters(run), undisturbed[1].parameters)
    assert not [entry for entry in (run / "checkpoints").iterdir() if "tmp" in entry.name]


def test_compiled_programs_are_kept(base, tmp_path):
    """A second start compiles no step; a damaged entry is compiled for again."""
    path, run = config_file(base, tmp_path), tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_LOG_COMPILES": "1"}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        environment.pop(name, None)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def trained(steps: int) -> str:
        command = [sys.executable, "-m", "aurora_jax", "train", str(path), "--stop-after", str(steps)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 143), done.stderr[-2000:]
        return done.stderr

    hit = "Persistent compilation cache hit for 'jit_train_step'"
    assert hit not in trained(1)
    assert hit in trained(2)
    for entry in (run / "compiled").glob("jit_train_step-*"):
        entry.write_bytes(b"damaged")
    trained(3)
    assert len(losses(run)) == 3


def test_further_sigterms_do_not_cut_off_the_last_save(base, undisturbed, tmp_path):
    path, run = config_file(replace(base, checkpoint=CheckpointConfig(every=1000)), tmp_path), tmp_path / "run"
    process = start(path)
    wait_for(process, lambda: steps_recorded(run) >= 2)
    for _ in range(5):
        process.terminate()
        time.sleep(0.01)
    assert process.wait() == 143
    assert newest_step(run) == len(losses(run)) < 12
    assert start(path).wait() == 0
    assert losses(run) == losses(undisturbed[0])


FULL_DISK = """
import resource, sys
from aurora_jax.cli import main
from aurora_jax.train import checkpoint
checkpoint.FIRST_PAUSE = 0.05
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(["train", sys.argv[1]]))
"""


def test_a_save_that_fails_is_said_and_tried_again(base, undisturbed, tmp_path):
    """Files may not become as large as a checkpoint's: the storage refuses, in the background. The last sound
    checkpoint stays, and every step that was done stays in the log."""
    # Of the files of arrays, writer threads decide how many there are and how large; this one is always as large.
    always = Path("optimizer", "_METADATA")
    config = replace(base, checkpoint=CheckpointConfig(every=2))
    path, run = config_file(config, tmp_path), tmp_path / "run"
    train(replace(config, output=run, stop_after=4))
    limit = (run / "checkpoints" / "4" / always).stat().st_size - 1
    command = [sys.executable, "-c", FULL_DISK, str(path), str(limit)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "a checkpoint could not be written" in done.stdout
    assert "the newest is of step 4, and is sound" in done.stdout
    assert "5 checkpoints in a row could not be written" in done.stderr
    assert newest_step(run) == 4
    assert len(losses(run)) > 4
    assert start(path).wait() == 0
    assert losses(run) == losses(undisturbed[0])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.full
@pytest.mark.parametrize("free", [0, 20_000, 60_000, 120_000])
def test_a_file_system_of_a_few_megabytes_fills_up(base, undisturbed, small_disk, tmp_path, monkeypatch, free):
    """While the run is at work, with so many bytes left: it ends in words, and goes on when there is room."""
    monkeypatch.setattr(checkpoint_of_run, "FIRST_PAUSE", 0.05)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    config = replace(base, output=small_disk / "run", checkpoint=CheckpointConfig(every=2))
    train(replace(config, stop_after=4))
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, max(0, ballast.stat().st_size - free))
    with pytest.raises(InputError, match=r"could not be written|cannot be written"):
        train(config)
    assert newest_step(config.output) >= 4
    ballast.unlink()
    state = train(config)
    assert_same_state(state, undisturbed[1])
    assert losses(config.output) == losses(undisturbed[0])


@pytest.mark.parametrize("output", ["/proc/run", "a file/run"])
def test_an_output_that_cannot_be_written_is_one_sentence(base, tmp_path, output, capsys):
    (tmp_path / "a file").touch()
    with pytest.raises(InputError, match="run cannot be written: "):
        train(replace(base, output=tmp_path / output))


def test_a_store_that_loses_a_file_is_named_and_the_run_goes_on_when_it_is_back(base, undisturbed, tmp_path):
    stores = tmp_path / "stores"
    shutil.copytree(base.data.stores, stores)
    config = replace(base, output=tmp_path / "run", data=replace(base.data, stores=str(stores)))
    train(replace(config, stop_after=5))
    lost = max((file for file in stores.glob("*/train/**/*") if file.is_file()), key=lambda file: file.stat().st_size)
    lost.rename(tmp_path / "lost")
    with pytest.raises(InputError, match=re.escape(str(lost.relative_to(stores).parts[0]))):
        train(config)
    (tmp_path / "lost").rename(lost)
    assert_same_state(train(config), undisturbed[1])
    assert losses(config.output) == losses(undisturbed[0])


def test_all_hosts_go_on_from_what_the_first_one_sees(undisturbed, base, monkeypatch):
    """This process stands for another one than the first, and sees more, or less, than the first does."""
    monkeypatch.setattr(checkpoint_of_run, "is_first", lambda: False)
    monkeypatch.setattr(checkpoint_of_run, "VISIBLE_SECONDS", 0.1)
    for step in (8, 12):
        monkeypatch.setattr(checkpoint_of_run, "of_first", lambda _, seen=step: seen + 1)
        assert choose_start(base).path.name == str(step)
    monkeypatch.setattr(checkpoint_of_run, "of_first", lambda _: 100)
    with pytest.raises(InputError, match="does not see it"):
        choose_start(base)
