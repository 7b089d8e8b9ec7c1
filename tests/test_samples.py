"""What a run writes while it trains: the model of that moment, on any mesh, without a trace in the training itself."""

import contextlib
import io
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from eight_devices import run_on_eight_devices
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.data.text.tokenizer import tokenizer_of
from aurora_jax.errors import InputError
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.evaluate.report import write_report
from aurora_jax.generate.generator import Programs, make_inference_mesh
from aurora_jax.generate.sampling import Sampling
from aurora_jax.model.config import PRESETS, ComputeConfig, ModelConfig
from aurora_jax.model.mesh import make_mesh
from aurora_jax.model.sharding import nest, parameter_shapes, parameter_shardings
from aurora_jax.plan.topology import tpu_topology
from aurora_jax.storage.json_lines import line_of
from aurora_jax.train import samples
from aurora_jax.train.config import CheckpointConfig, DataConfig, EvaluationConfig, MeshConfig, TrainConfig
from aurora_jax.train.loop import train
from aurora_jax.train.metrics import drop_from
from aurora_jax.train.stages import LearningRate, Stage
from convert.__main__ import main as convert

HERE = Path(__file__).parent
PROMPTS = (("fi", "Kaikki ihmiset"), ("code", "def clamp(\n"), ("fi", "ja <b>"))


@pytest.fixture(scope="module")
def base(mini_corpus, mini_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    return TrainConfig(
        output=folder / "run",
        stages=(Stage("cap", "nano_cap", 4, LearningRate(peak=1e-2, decay_steps=10)), Stage("cat", "nano_cat", 2)),
        model=ModelConfig(vocabulary_size=400, max_positions=48, width=16, layers=2, heads=2, mlp_width=24),
        data=DataConfig(
            corpus=str(mini_corpus),
            tokenizer=mini_tokenizer,
            stores=str(folder / "stores"),
            batch_size=8,
            sequence_length=32,
        ),
        compute=ComputeConfig("float32", "float32"),
        evaluation=EvaluationConfig(
            tasks=("sample_en",), every=100, quick_windows=2, batch_size=2, prompts=PROMPTS, max_new_tokens=12
        ),
        checkpoint=CheckpointConfig(every=2),
        log_format="lines",
    )


@pytest.fixture(scope="module")
def greedy_run(base):
    """The run, its last state, and what it said; the best token each time, as `transformers` takes it too."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(samples, "SAMPLING", Sampling())
        state = train(base)
    return base.output, state, said.getvalue()


def samples_of(run: Path) -> dict[int, list[dict]]:
    return {row["step"]: row["samples"] for row in read_metrics(run / "metrics.jsonl") if "samples" in row}


def test_each_complete_evaluation_has_a_continuation_of_every_prompt(greedy_run):
    rows = read_metrics(greedy_run[0] / "metrics.jsonl")
    found = samples_of(greedy_run[0])
    assert list(found) == [0, 4, 6]
    for written in found.values():
        assert [(each["language"], each["prompt"]) for each in written] == list(PROMPTS)
    assert [row["stage"] for row in rows if "samples" in row] == ["start", "cap", "cat"]
    assert [each["continuation"] for each in found[0]] != [each["continuation"] for each in found[6]]
    assert all("samples" not in row for row in rows if "loss" in row or "evaluation" in row)


@pytest.mark.parametrize(("stage", "step"), [("cap", 4), ("cat", 6)])
def test_they_are_what_transformers_makes_of_the_stage(greedy_run, tmp_path, stage, step):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    where = greedy_run[0] / "stages" / stage
    assert convert(["to-torch", str(where), str(tmp_path / "torch")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "torch", dtype=torch.float32)
    tokenizer = tokenizer_of(checkpoint.read_files(where), where)
    for each in samples_of(greedy_run[0])[step]:
        prompt = tokenizer.encode(each["prompt"])
        with torch.inference_mode():
            tokens = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        new = [token for token in tokens[0, len(prompt) :].tolist() if token != tokenizer.eos_id]
        assert each["continuation"] == tokenizer.decode_behind(prompt, new)


def test_training_is_the_same_without_them(base, greedy_run, tmp_path):
    plain = replace(base, output=tmp_path / "plain", evaluation=replace(base.evaluation, prompts=()))
    for one, other in zip(jax.tree.leaves(train(plain)), jax.tree.leaves(greedy_run[1]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert samples_of(plain.output) == {}


def test_a_stopped_run_has_each_row_once(base, greedy_run, tmp_path, monkeypatch):
    """Stopped at a stage's end; a kill has cut off the complete evaluation, but not its samples."""
    monkeypatch.setattr(samples, "SAMPLING", Sampling())
    config = replace(base, output=tmp_path / "run")
    train(replace(config, stop_after=4))
    metrics = config.output / "metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines(keepends=True) if '"goodput"' not in line]
    metrics.write_text("".join(lines[:-1]))
    assert "samples" in lines[-2]
    train(config)
    for kind in ("samples", "evaluation", "task_loss"):
        found, expected = (
            [(row["step"], row[kind]) for row in read_metrics(path) if kind in row]
            for path in (metrics, greedy_run[0] / "metrics.jsonl")
        )
        assert found == expected
    events = EventAccumulator(str(config.output / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Tensors("samples/1_fi")] == [0, 4, 6]


@pytest.mark.parametrize("lost", range(4))
def test_samples_stay_where_their_evaluation_does(greedy_run, tmp_path, lost):
    """Of the rows of step 4 (quick evaluation, samples, complete evaluation), as many as a kill would leave."""
    rows = [row for row in read_metrics(greedy_run[0] / "metrics.jsonl") if row["step"] + ("loss" in row) <= 4]
    rows = [row for row in rows if "goodput" not in row]
    left = rows[: len(rows) - lost]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(line_of, left)))
    kept = drop_from(tmp_path / "metrics.jsonl", 4)
    assert kept == read_metrics(tmp_path / "metrics.jsonl") == (left if lost != 1 else left[:-1])
    assert [row["step"] for row in kept if "samples" in row] == [0, 4][: 1 + (lost == 0)]


def test_console_tensorboard_and_report_show_them(greedy_run, tmp_path):
    output, _, said = greedy_run
    found = samples_of(output)
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    write_report(output, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for step, stage in ((0, "start"), (4, "cap"), (6, "cat")):
        for number, each in enumerate(found[step], start=1):
            shown = f"{each['prompt']}⟶{each['continuation']}"
            assert f"{stage} step {step}  {each['language']}: {each['prompt'].splitlines()[0]}" in said
            (text,) = [
                event.tensor_proto.string_val[0].decode()
                for event in events.Tensors(f"samples/{number}_{each['language']}")
                if event.step == step
            ]
            assert text == "\n".join(f"    {line}" for line in shown.splitlines())
    assert "<h2>What it wrote on the way</h2>" in page
    assert "ja &lt;b&gt;" in page
    assert re.findall(r"<b>((?:before|after)[^<]*)</b>", page)[:3] == ["before", "after cap", "after cat"]


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ({"prompts": (("fi", ""),)}, "The prompt is empty"),
        ({"prompts": (("fi", "Kaikki " * 40),)}, "has learned only 48 positions"),
        ({"prompts": (("fi", "K"),), "max_new_tokens": 48}, "has learned only 48 positions"),
    ],
)
def test_what_cannot_be_gone_on_with_is_said_before_the_first_step(base, tmp_path, evaluation, said):
    config = replace(base, output=tmp_path / "run", evaluation=replace(base.evaluation, **evaluation))
    with pytest.raises(InputError, match=said):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("fields", [{"max_new_tokens": 0}, {"tasks": (), "prompts": PROMPTS}])
def test_settings_without_a_meaning_are_refused(fields):
    with pytest.raises(InputError, match=r"evaluation\.(max_new_tokens|prompts)"):
        EvaluationConfig(**fields)


def test_prompts_can_be_typed():
    arguments = ["--prompts", "fi", "Helsinki on", "en", "London is", "--tasks", "sample_fi", "--keep"]
    found = tyro.cli(EvaluationConfig, args=arguments)
    assert found.prompts == (("fi", "Helsinki on"), ("en", "London is"))
    assert (found.tasks, found.keep) == (("sample_fi",), ())
    assert tyro.cli(EvaluationConfig, args=["--tasks"]).tasks == ()
    assert tyro.cli(EvaluationConfig, args=[]).tasks is None


def test_on_a_mesh_as_on_one_device():
    done = run_on_eight_devices(HERE / "samples_on_a_mesh.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2


def test_over_two_processes_as_on_one_device():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent), "PATH": ""}
    program = [sys.executable, str(HERE / "samples_on_a_mesh.py"), str(port), "2"]
    settings = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = [subprocess.Popen([*program, str(number)], **settings) for number in range(2)]
    said = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert all(text.count("equal") == 1 for text in said)


def test_the_copy_of_starcoderplus_needs_room_for_little_more_than_itself():
    """On 256 chips of v5e, by the TPU compiler: 2 GB a chip for the copy, and less than a whole layer on the way."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, exists for Linux on x86-64 only")
    model = PRESETS["starcoderplus"]
    mesh = make_mesh(MeshConfig(fsdp=16, fsdp_inner=16), tpu_topology("v5e:16x16").devices)
    inference = make_inference_mesh(model, list(mesh.devices.flat))
    assert inference.shape["tensor"] == 16
    weights = samples.InferenceWeights(Programs(model, ComputeConfig("bfloat16", "bfloat16", "flash"), inference))
    shapes = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        nest(parameter_shapes(model)),
        parameter_shardings(model, mesh),
    )
    with jax.set_mesh(inference):
        compiled = weights.layer.lower(shapes["layers"], jax.ShapeDtypeStruct((), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    of_a_layer = sum(2 * np.prod(shape.shape[1:]) for shape in jax.tree.leaves(shapes["layers"]))
    assert memory.output_size_in_bytes < 1.1 * of_a_layer / 16 + 1e6
    assert memory.temp_size_in_bytes < of_a_layer
