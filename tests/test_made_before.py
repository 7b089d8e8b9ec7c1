"""What an earlier version wrote opens and goes on: a converted checkpoint, stores, a run that was stopped.

`recorded.json` beside them says what is in them, as Orbax, TensorStore and safetensors read it, and how the run went on
undisturbed; see the README there.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.data.text.documents import Instruction
from aurora_jax.data.text.recipe import Recipe
from aurora_jax.data.text.sources import Source
from aurora_jax.data.text.tokenizer import tokenizer_from
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.evaluate.report import write_report
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.sharding import flatten
from aurora_jax.train.config import CheckpointConfig, DataConfig, EvaluationConfig, TrainConfig
from aurora_jax.train.loop import train
from aurora_jax.train.stages import LearningRate, Stage
from convert.__main__ import main as convert

MADE = Path(__file__).with_name("data") / "made_by_2026_11_25"
RECORDED = json.loads((MADE / "recorded.json").read_text())


def digest(array: np.ndarray) -> str:
    array = np.ascontiguousarray(array)
    return f"{array.dtype.name} {list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()}"


@pytest.mark.parametrize(("place", "name"), [("checkpoint", "checkpoint"), ("run/stages/first", "first")])
def test_a_checkpoint_has_the_values_that_were_written(place: str, name: str) -> None:
    parameters = flatten(restore_parameters(MADE / place))
    assert {path: digest(np.asarray(array)) for path, array in parameters.items()} == RECORDED[name]


def test_a_checkpoint_is_exported(tmp_path: Path) -> None:
    assert convert(["to-torch", str(MADE / "checkpoint"), str(tmp_path / "hf")]) == 0
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert {name: digest(array) for name, array in exported.items()} == RECORDED["torch"]


@pytest.mark.parametrize("place", RECORDED["stores"])
def test_a_store_has_the_values_that_were_written(place: str) -> None:
    store = TokenStore.open(MADE / "stores" / place)
    size = len(store)
    start = np.zeros(1, np.int64)
    documents = [store.document(number) for number in range(store.info.documents)]
    found = {
        "tokens": store.read(0, size),
        "ends": store.window_ends(start, size)[0],
        "offsets": np.cumsum([0, *map(len, documents)]),
    } | ({"learn": store.window_learn(start, size)[0]} if store.info.masked else {})
    assert {name: digest(array) for name, array in found.items()} == RECORDED["stores"][place]
    np.testing.assert_array_equal(np.concatenate(documents), found["tokens"])


def test_a_step_is_known_to_the_stores_that_it_made() -> None:
    """Wherever its file is now: a store of another recipe would be refused."""
    source = Source(
        {"train": (f"{MADE}/corpus/questions.jsonl",)},
        "jsonl",
        text=None,
        fields={"instruction": "instruction", "response": "answer"},
    )
    tokenizer = tokenizer_from(MADE / "run" / "tokenizer")
    for learn in ("response", "everything"):
        recipe = Recipe("questions", "train", source, (Instruction(learn=learn),), tokenizer, True)
        made_it = TokenStore.open(MADE / "stores/questions/train").info.fingerprint in recipe.fingerprints
        assert made_it == (learn == "response")


def test_a_run_goes_on_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What could not be compared is said; the losses are those of the undisturbed run by the code of then."""
    run = shutil.copytree(MADE / "run", tmp_path / "run")
    config = TrainConfig(
        output=run,
        stages=(
            Stage("first", "nano_base", 4, LearningRate(peak=1e-2, warmup_steps=2, decay_steps=8)),
            Stage("second", "nano_base", 5),
        ),
        initial_checkpoint=MADE / "checkpoint",
        data=DataConfig(corpus=str(MADE / "corpus"), stores=str(MADE / "stores"), batch_size=4, sequence_length=32),
        compute=ComputeConfig("float32", "float32"),
        evaluation=EvaluationConfig(tasks=("sample_en", "sample_code"), every=4, quick_windows=2, batch_size=2),
        checkpoint=CheckpointConfig(every=2, keep=1),
        log_format="lines",
    )
    train(config)
    assert "recorded neither rates nor sizes" in capsys.readouterr().out
    found = {row["step"]: row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row}
    assert list(found) == list(range(9))
    np.testing.assert_allclose(list(found.values()), list(RECORDED["losses"].values()), rtol=1e-5)
    assert [entry["stage"] for entry in checkpoint.read_metadata(run / "stages" / "second").lineage] == [
        "first",
        "second",
    ]
    write_report(run, run / "report.html")
    page = (run / "report.html").read_text()
    assert "data:image/png" in page
