"""Runs whose folder is in a bucket: what a kill, a fault of the storage or damage does to them.

A run in a folder is the reference, bit for bit.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from bucket import BUCKET, bucket_in

from aurora_jax.checkpoints.run_folder import newest_step, steps_in
from aurora_jax.cli import main
from aurora_jax.errors import InputError
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.launch.progress import newest_of
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.storage import line_log, places
from aurora_jax.storage.line_log import LineLog
from aurora_jax.storage.places import place_of
from aurora_jax.train import checkpoint as checkpoint_of_run
from aurora_jax.train.config import CheckpointConfig, DataConfig, EvaluationConfig, TrainConfig
from aurora_jax.train.loop import train
from aurora_jax.train.stages import LearningRate, Stage
from convert.__main__ import main as convert

ROOT = Path(__file__).resolve().parents[1]
STAGES = (
    Stage("cap", "nano_cap", 5, LearningRate(peak=1e-2, warmup_steps=2, decay_steps=8)),
    Stage("cat", "nano_cat", 3),
)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with bucket_in(tmp_path_factory.mktemp("storage") / "objects") as bucket:
        yield bucket


@pytest.fixture(scope="module")
def base(mini_corpus, mini_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return TrainConfig(
        output=folder / "undisturbed",
        stages=STAGES,
        model=ModelConfig(vocabulary_size=400, max_positions=32, width=16, layers=2, heads=2, mlp_width=24),
        data=DataConfig(
            corpus=str(mini_corpus),
            tokenizer=mini_tokenizer,
            stores=str(folder / "stores"),
            batch_size=8,
            sequence_length=32,
        ),
        compute=ComputeConfig("float32", "float32"),
        evaluation=EvaluationConfig(tasks=("sample_en",), every=4, quick_windows=2, batch_size=2),
        checkpoint=CheckpointConfig(every=2),
        log_format="lines",
    )


@pytest.fixture(scope="module")
def undisturbed(base):
    train(base)
    return base.output


def said_of(run) -> list:
    """What metrics.jsonl says but for times and speeds."""
    kept = ("step", "stage", "loss", "gradient_norm", "learning_rate", "task_loss", "evaluation", "complete")
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "goodput" not in row]
    return [{name: row[name] for name in kept if name in row} for row in rows]


def test_a_run_in_a_bucket_is_the_one_in_a_folder(bucket, base, undisturbed, capsys):
    output = place_of(f"{BUCKET}/same/run")
    train(replace(base, output=output))
    assert said_of(output) == said_of(undisturbed)
    assert newest_step(output) == 8
    names = {entry.name for entry in output.iterdir()}
    assert {entry.name for entry in undisturbed.iterdir()} - names == {"metrics.jsonl"}
    assert names >= {"metrics-000000.jsonl", "run.json", "goodput.json", "checkpoints", "stages", "tensorboard"}
    capsys.readouterr()
    for command in ("ls", "verify", "lineage"):
        assert main(["checkpoints", command, str(output)]) == 0
    assert main(["checkpoints", "newest", str(output)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 8
    written = Path(base.output.parent / "torch")
    assert convert(["to-torch", str(output / "stages" / "cap"), str(written)]) == 0
    assert convert(["verify", str(written), str(undisturbed / "stages" / "cap")]) == 0
    assert main(["generate", str(output), "Kaikki", "--max-new-tokens", "2"]) == 0
    step = ["python", "-m", "aurora_jax", "train", "config.py", "--output", str(output)]
    assert newest_of([sys.executable, *step[1:]]).step == 8
    assert main(["report", str(output), "--output", str(base.output.parent / "report.html")]) == 0


def test_segments_laid_end_to_end_are_the_log(bucket, tmp_path, monkeypatch):
    """The same rows through both, with a resume in the middle that leaves some out; NaN is one of the values."""
    monkeypatch.setattr(line_log, "SEGMENT_BYTES", 200)
    rows = [{"step": step, "loss": float("nan") if step % 3 else 0.5, "text": "ä" * (step % 7)} for step in range(40)]
    logs = [tmp_path / "metrics.jsonl", place_of(f"{BUCKET}/log/metrics.jsonl")]
    for path in logs:
        assert not line_log.is_there(path)
        log = LineLog(path)
        for row in rows[:30]:
            log.append(row)
        log.close()
        kept = [row for row in line_log.read_log(path) if row["step"] < 17 and row["step"] != 5]
        line_log.rewrite(path, kept)
        log = LineLog(path)
        for row in rows[17:]:
            log.append(row)
            log.flush()
        log.close()
    segments = sorted(logs[1].parent.iterdir())
    assert len(segments) > 5
    assert b"".join(segment.read_bytes() for segment in segments) == logs[0].read_bytes()
    assert [row["step"] for row in line_log.read_log(logs[1])] == [step for step in range(40) if step != 5]
    line_log.rewrite(logs[1], [])
    assert not line_log.is_there(logs[1])


def test_what_a_line_costs_does_not_grow(bucket):
    """Bytes sent for 60 lines after 60, and after 1,200 of them, each sent at once."""
    path, sent = place_of(f"{BUCKET}/cost/metrics.jsonl"), []
    for _ in range(2):
        log, before = LineLog(path), bucket.received
        for number in range(60):
            log.append({"number": number, "text": "x" * 1000})
            log.flush()
        sent.append(bucket.received - before)
        for _ in range(1_200):
            log.append({"text": "x" * 1000})
        log.close()
    assert sent[1] < 1.5 * sent[0]


def start(path: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "aurora_jax", "train", str(path), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def config_file(config: TrainConfig, folder: Path) -> Path:
    """The config as a file, for a process of its own."""
    path = folder / "config.py"
    path.write_text(
        "from pathlib import Path, PosixPath\n"
        "from aurora_jax.model.config import *\nfrom aurora_jax.train.config import *\nfrom "
        "aurora_jax.train.stages import *\n"
        f"def config():\n    return {config!r}\n"
    )
    return path


@pytest.mark.parametrize(("kills", "faults"), [(1, 0.01), pytest.param(6, 0.05, marks=pytest.mark.full)])
def test_a_run_that_is_killed_while_the_storage_fails(bucket, base, undisturbed, tmp_path, kills, faults):
    """Killed at random moments, saves among them, while some of the requests are answered with 429 or 5xx."""
    output, choice = place_of(f"{BUCKET}/killed_{kills}/run"), random.Random(1)
    path = config_file(base, tmp_path)
    bucket.answered.clear()
    bucket.answer = lambda method, _: choice.choice((429, 500, 503)) if choice.random() < faults else None
    try:
        for _ in range(kills):
            process, wanted = start(path, "--output", str(output)), choice.randrange(1, 6)
            while process.poll() is None and (newest_step(output) or 0) < wanted:
                time.sleep(0.05)
            time.sleep(choice.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        said, _ = (process := start(path, "--output", str(output))).communicate()
    finally:
        bucket.answer = lambda method, path: None
    assert process.returncode == 0, said.decode()
    assert sum(bucket.answered.values()) > 0
    assert said_of(output) == said_of(undisturbed)
    assert steps_in(output)[-2:] == [6, 8]
    assert main(["checkpoints", "verify", str(output)]) == 0


def test_a_refused_write_ends_the_run_and_its_last_checkpoint_stays(bucket, base, undisturbed, monkeypatch, capfd):
    output = place_of(f"{BUCKET}/refused/run")
    train(replace(base, output=output, stop_after=4))
    monkeypatch.setattr(checkpoint_of_run, "FIRST_PAUSE", 0.05)
    bucket.answer = lambda method, path: 403 if method in ("POST", "PUT") and "checkpoints" in path else None
    try:
        with pytest.raises(InputError, match="5 checkpoints in a row could not be written"):
            train(replace(base, output=output))
    finally:
        bucket.answer = lambda method, path: None
    assert "a checkpoint could not be written" in capfd.readouterr().out
    assert newest_step(output) == 4
    train(replace(base, output=output))
    assert said_of(output) == said_of(undisturbed)


def test_a_server_that_is_away_for_a_while_is_waited_for(bucket, base, undisturbed, monkeypatch):
    output, gone = place_of(f"{BUCKET}/away/run"), []

    def answer(method: str, path: str) -> None:
        if not gone and "checkpoints" in path and "4" in path and method in ("POST", "PUT"):
            gone.append(path)
            bucket.stop()
            threading.Timer(3.0, bucket.start).start()

    bucket.answer = answer
    try:
        train(replace(base, output=output))
    finally:
        bucket.answer = lambda method, path: None
    assert gone
    assert said_of(output) == said_of(undisturbed)


def test_a_damaged_checkpoint_is_set_aside_and_a_cut_off_one_removed(bucket, base, undisturbed, capsys):
    output = place_of(f"{BUCKET}/damaged/run")
    train(replace(base, output=output, stop_after=6))
    step = output / "checkpoints" / "6"
    largest = max(places.files_below(step / "params"), key=lambda file: places.status_of(file)[0])
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(bytes(content))
    # What a save that is killed leaves: all but the time of the commit.
    for file in places.files_below(output / "checkpoints" / "5"):
        if file.name != "commit_success.txt":
            content = file.read_bytes()
            if file.name == "_CHECKPOINT_METADATA":
                content = json.dumps({**json.loads(content), "commit_timestamp_nsecs": None}).encode()
            (output / "checkpoints" / "7" / file.relative_to(output / "checkpoints" / "5")).write_bytes(content)
    assert newest_step(output) == 6
    train(replace(base, output=output))
    said = capsys.readouterr().out
    assert "set aside as gs://bucket/damaged/run/set_aside/6" in said
    assert "the run looks at step 5 instead" in said
    assert "removed 1 leftovers of saves that were cut off: checkpoints/7" in said
    assert {entry.name for entry in (output / "set_aside").iterdir()} == {"6"}
    assert said_of(output) == said_of(undisturbed)


def test_places_where_nothing_can_be_written_are_one_sentence(bucket, base, tmp_path, capsys):
    path = str(config_file(base, tmp_path))
    assert main(["train", path, "--output", "gs://no-such-bucket/run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: gs://no-such-bucket/run cannot be written: ")
    assert len(said.splitlines()) == 1
    with pytest.raises(SystemExit, match="2"):  # the command line's own refusal
        main(["train", path, "--output", "s3://bucket/run"])
    with pytest.raises(InputError, match="s3://bucket/run: runs and checkpoints cannot be on s3://"):
        place_of(Path("s3://bucket/run"))
