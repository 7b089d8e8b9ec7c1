"""Speed in the numbers of the plan, traces that TensorBoard finds, and Weights & Biases only where it is asked for."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from jax.profiler import ProfileData
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aurora_jax.chips import CHIPS
from aurora_jax.errors import InputError
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.model.config import PRESETS, ComputeConfig, ModelConfig
from aurora_jax.model.flops import flops_per_token
from aurora_jax.plan.topology import tpu_topology
from aurora_jax.train.config import CheckpointConfig, DataConfig, EvaluationConfig, TrainConfig
from aurora_jax.train.loop import train
from aurora_jax.train.stages import LearningRate, Stage
from aurora_jax.train.throughput import Throughput


class FakeWandb:
    """What we use of the package, remembered."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return SimpleNamespace(log=lambda scalars, step: self.logged.append((step, scalars)), finish=self.finish)

    def finish(self):
        self.finished += 1


@pytest.fixture(scope="module")
def base(mini_corpus, mini_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("observed")
    return TrainConfig(
        output=folder / "run",
        stages=(Stage("cap", "nano_cap", 4, LearningRate(peak=1e-2, warmup_steps=2, decay_steps=10)),),
        model=ModelConfig(vocabulary_size=400, max_positions=32, width=16, layers=2, heads=2, mlp_width=24),
        data=DataConfig(
            corpus=str(mini_corpus),
            tokenizer=mini_tokenizer,
            stores=str(folder / "stores"),
            batch_size=8,
            sequence_length=32,
        ),
        compute=ComputeConfig("float32", "float32"),
        evaluation=EvaluationConfig(tasks=("sample_en", "sample_fi"), every=100, quick_windows=2, batch_size=2),
        checkpoint=CheckpointConfig(every=2),
        log_format="lines",
    )


@pytest.fixture(scope="module")
def observed(base):
    """A run that is stopped after two steps and goes on, traced in steps 1 to 2, with Weights & Biases."""
    fake = FakeWandb()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", fake)
        config = replace(base, wandb_project="aurora", profile_steps=(1, 2))
        train(replace(config, stop_after=2))
        train(config)
    return base.output, fake


def test_flops_of_starcoderplus_are_those_counted_by_hand():
    """The matrices of 40 layers, and the embedding that is the head; biases, norms and positions are left out here."""
    matrices = 40 * 6144 * (6144 + 2 * 128 + 6144 + 2 * 24576) + 49152 * 6144
    scores = (
        40 * 2 * 48 * 128 * 8192 / 2
    )  # queries times keys and weights times values, multiply-adds a token, the causal half
    assert flops_per_token(PRESETS["starcoderplus"], 8192) == pytest.approx(6 * (matrices + scores), rel=0.005)


def test_mfu_is_that_of_the_plan_for_the_same_step_time():
    """The 15.5B step on 64 v5p, in the seconds and at the MFU that its config states."""
    plan = (Path(__file__).parents[1] / "configs" / "starcoderplus_v5p_128.py").read_text()
    seconds, mfu = (float(re.findall(figure, plan)[0]) for figure in (r"([\d.]+) s a step", r"MFU at most ([\d.]+)%"))
    figures = Throughput.of(
        PRESETS["starcoderplus"], batch_size=512, sequence_length=8192, chips=64, device_kind="TPU v5"
    ).at(1 / seconds)  # fmt: skip
    assert figures["tokens_per_second_per_chip"] == pytest.approx(4_194_304 / seconds / 64)
    assert figures["mfu"] == pytest.approx(mfu / 100, abs=1e-3)


def test_no_mfu_without_a_known_peak():
    assert "mfu" not in Throughput.of(
        PRESETS["starcoderplus"], batch_size=2, sequence_length=8, chips=1, device_kind="cpu"
    ).at(1.0)


@pytest.mark.parametrize("name", CHIPS)
def test_chips_go_by_the_names_that_the_tpu_compiler_gives_them(name):
    (kind,) = {device.device_kind for device in tpu_topology(f"{name}:{CHIPS[name].sizes[0]}").devices}
    assert (
        Throughput.of(PRESETS["starcoderplus"], batch_size=1, sequence_length=8, chips=1, device_kind=kind).peak
        == CHIPS[name].peak
    )


def test_speed_is_in_every_row(observed):
    rows = [row for row in read_metrics(observed[0] / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["tokens_per_second_per_chip"] == row["tokens_per_second"] > 0 for row in rows)  # one device
    assert not any("mfu" in row for row in rows)  # the peak of a CPU is not known


def test_tensorboard_has_the_curves_of_metrics_jsonl(observed):
    events = EventAccumulator(str(observed[0] / "tensorboard"))
    events.Reload()
    rows = [row for row in read_metrics(observed[0] / "metrics.jsonl") if "loss" in row]
    written = [(tensor.step, float(tensor.tensor_proto.float_val[0])) for tensor in events.Tensors("train/loss")]
    assert written == [(row["step"], pytest.approx(row["loss"])) for row in rows]
    assert {"train/tokens_per_second_per_chip", "bits_per_byte/sample_en"} <= set(events.Tags()["tensors"])


def test_quick_and_complete_evaluations_are_curves_of_their_own(base, observed):
    """In TensorBoard, where a stop and a resume write nothing twice; W&B has the same names."""
    events = EventAccumulator(str(observed[0] / "tensorboard"))
    events.Reload()
    rows = [row for row in read_metrics(observed[0] / "metrics.jsonl") if "evaluation" in row]
    assert [(row["step"], row["complete"]) for row in rows] == [(0, False), (0, True), (4, False), (4, True)]
    for name, complete in (("bits_per_byte/sample_fi", True), ("bits_per_byte_of_2_windows/sample_fi", False)):
        expected = [
            (row["step"], row["evaluation"]["sample_fi"]["bits_per_byte"])
            for row in rows
            if row["complete"] == complete
        ]
        drawn = [(tensor.step, float(tensor.tensor_proto.float_val[0])) for tensor in events.Tensors(name)]
        assert drawn == [(step, pytest.approx(value)) for step, value in expected]
        assert [step for step, scalars in observed[1].logged if name in scalars] == [0, 4]


def test_the_console_tells_quick_from_complete_and_shows_the_change(base, tmp_path, capsys):
    train(replace(base, output=tmp_path / "run"))
    said = " ".join(capsys.readouterr().out.split())
    rows = {
        row["complete"]: row
        for row in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "evaluation" in row and row["step"] == 4
    }
    before = {
        row["complete"]: row
        for row in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "evaluation" in row and row["step"] == 0
    }
    for complete, name in ((False, "quick, 2 windows a task, of 32 tokens"), (True, "all held-out text, of 32 tokens")):
        values = [each[complete]["evaluation"]["sample_en"]["bits_per_byte"] for each in (before, rows)]
        assert f"start step 0 bits per byte ({name}): en {values[0]:.3f} fi" in said
        assert f"cap step 4 bits per byte ({name}): en {values[1]:.3f} ({values[1] / values[0] - 1:+.1%})" in said


def test_traces_lie_where_tensorboard_looks_and_have_the_steps(observed):
    """Steps 1 and 2, of which the second belongs to the process that resumed."""
    files = sorted((observed[0] / "profile" / "plugins" / "profile").glob("*/*.xplane.pb"))
    steps = []
    for file in files:
        for plane in ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                steps += [dict(event.stats)["step_num"] for event in line.events if event.name == "train"]
    assert sorted(steps) == [1, 2]


def test_wandb_gets_what_tensorboard_gets_and_a_resumed_run_goes_on(base, observed):
    output, fake = observed
    first, second = fake.started
    assert (first["project"], first["name"], first["resume"]) == ("aurora", "run", "allow")
    assert first["id"] == second["id"] == json.loads((output / "wandb.json").read_text())["id"]
    assert json.loads(json.dumps(first["config"]))["data"]["batch_size"] == 8
    assert [step for step, scalars in fake.logged if "train/loss" in scalars] == [0, 1, 2, 3]
    assert any("bits_per_byte/sample_fi" in scalars for _, scalars in fake.logged)
    assert fake.finished == 2


def test_wandb_that_is_not_installed_is_asked_for_before_anything_is_written(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        train(replace(base, output=tmp_path / "run", wandb_project="aurora"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [(2, 1), (-1, 1), (0, 4)])
def test_steps_that_the_run_does_not_have_cannot_be_traced(base, steps):
    with pytest.raises(InputError, match="0 to 3"):
        replace(base, profile_steps=steps)
