"""A run of several processes as the command line starts it: told to stop, killed, wrongly described."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from bucket import bucket_in

from aurora_jax.checkpoints.run_folder import newest_step
from aurora_jax.errors import HUNG, InputError
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.storage.places import place_of
from aurora_jax.train import processes

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
from pathlib import Path
from aurora_jax.model.config import *
from aurora_jax.train.config import *
from aurora_jax.train.stages import *

def config():
    return TrainConfig(
        output=Path("run"),
        stages=(Stage("cap", "nano_cap", 60, LearningRate(peak=1e-2, decay_steps=60)),),
        model=ModelConfig(vocabulary_size=400, max_positions=32, width=16, layers=2, heads=2, mlp_width=24),
        data=DataConfig(corpus={corpus!r}, tokenizer=Path({tokenizer!r}), stores={stores!r}, batch_size=8,
                        sequence_length=32),
        compute=ComputeConfig("float32", "float32"),
        evaluation=EvaluationConfig(
            tasks=("sample_fi",), every=50, quick_windows=2, batch_size=2, prompts=(("fi", "Kaikki"),), max_new_tokens=8
        ),
        checkpoint=CheckpointConfig(every=20),
    )
"""


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({processes.ADDRESS: "a:1"}, "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (
            {processes.ADDRESS: "a:1", processes.COUNT: "2", processes.INDEX: "2"},
            "JAX_PROCESS_ID=2 is not one of the 2",
        ),
        ({processes.ADDRESS: "a:1", processes.COUNT: "two", processes.INDEX: "0"}, "two"),
        ({processes.DISTRIBUTED: "yes"}, "AURORA_DISTRIBUTED=yes: the one value is auto"),
    ],
)
def test_a_wrong_description_is_refused(environment, said):
    with pytest.raises(InputError, match=said):
        processes.join(environment)


def start(
    config: Path, output: Path, number: int, port: int, *words: str, count: int = 2, devices: int = 1
) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "AURORA_HEARTBEAT_SECONDS": "300" if words else "10",
        processes.ADDRESS: f"127.0.0.1:{port}",
        "JAX_NUM_CPU_DEVICES": str(devices),
        processes.COUNT: str(count),
        processes.INDEX: str(number),
    }
    command = [sys.executable, "-m", "aurora_jax", "train", str(config), "--output", str(output), *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE if words else None, text=True)


def run(
    config: Path, output: Path, then=lambda workers: None, *words: str, count: int = 2, devices: int = 1
) -> list[int]:
    """Processes; what is done to them when they are under way; their exit statuses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workers = [start(config, output, number, port, *words, count=count, devices=devices) for number in range(count)]
    then(workers)
    return [worker.wait() for worker in workers]


def losses(output: Path) -> list[tuple]:
    path = output / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows if "loss" in row]


def samples(output: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["samples"]) for row in rows if "samples" in row]


@pytest.mark.full
def test_all_stop_together_and_end_when_one_dies_and_the_losses_stay_the_same(mini_corpus, mini_tokenizer, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        CONFIG.format(corpus=str(mini_corpus), tokenizer=str(mini_tokenizer), stores=str(tmp_path / "stores"))
    )
    alone = [
        sys.executable,
        "-m",
        "aurora_jax",
        "train",
        str(config),
        "--output",
        str(tmp_path / "alone"),
        "--stop-after",
        "1",
    ]
    subprocess.run(alone, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)  # builds the stores
    assert run(config, tmp_path / "undisturbed") == [0, 0]

    disturbed = tmp_path / "disturbed"

    def after(steps: int, number: int, what: signal.Signals):
        def disturb(workers):
            while len(losses(disturbed)) < steps:
                assert all(worker.poll() is None for worker in workers)
                time.sleep(0.01)
            workers[number].send_signal(what)

        return disturb

    assert run(config, disturbed, after(8, 1, signal.SIGTERM)) == [143, 143]  # only one is told
    stopped = newest_step(disturbed)
    assert stopped == len(losses(disturbed))
    for victim in (0, 1):
        statuses = run(config, disturbed, after(len(losses(disturbed)) + 3, victim, signal.SIGKILL))
        assert statuses[victim] == -signal.SIGKILL
        assert statuses[1 - victim] not in (0, 2)
    assert run(config, disturbed) == [0, 0]
    assert losses(disturbed) == losses(tmp_path / "undisturbed")
    assert samples(disturbed) == samples(tmp_path / "undisturbed")
    assert [step for step, _ in samples(disturbed)] == [0, 60]


@pytest.mark.full
@pytest.mark.parametrize("place", ["a folder", "a bucket"])
def test_fewer_processes_and_fewer_devices_go_on_with_the_same_batches(mini_corpus, mini_tokenizer, tmp_path, place):
    """8 devices of 4 processes, then 4 of 2, then 1: losses of one device that was never stopped, to 1e-6."""
    config = tmp_path / "config.py"
    config.write_text(
        CONFIG.format(corpus=str(mini_corpus), tokenizer=str(mini_tokenizer), stores=str(tmp_path / "stores"))
    )
    alone = [sys.executable, "-m", "aurora_jax", "train", str(config), "--output", str(tmp_path / "alone")]
    subprocess.run(alone, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    with bucket_in(tmp_path / "objects") if place == "a bucket" else nullcontext():
        output = "gs://bucket/run" if place == "a bucket" else str(tmp_path / "run")
        whole = ("--evaluation.batch-size", "8")  # which 8 devices can divide
        assert run(config, output, drain, *whole, "--stop-after", "20", count=4, devices=2) == [0] * 4
        assert run(config, output, drain, *whole, "--stop-after", "40", count=2, devices=2) == [0] * 2
        assert run(config, output, drain, *whole, count=1) == [0]
        rows = [row for row in read_metrics(place_of(output) / "metrics.jsonl") if "loss" in row]
    expected = losses(tmp_path / "alone")
    assert [row["step"] for row in rows] == [step for step, *_ in expected]
    np.testing.assert_allclose([row["loss"] for row in rows], [loss for _, loss, _ in expected], rtol=1e-6)


def drain(workers) -> None:
    """Reads what they say, which would otherwise stop them."""
    for worker in workers:
        threading.Thread(target=worker.communicate, daemon=True).start()


SLOW = """
import os, sys, time
from aurora_jax.cli import main
from aurora_jax.data.batches.loader import Loader
batch = Loader.batch
def slow(self, *arguments):
    time.sleep(0.3 * int(os.environ["JAX_PROCESS_ID"]))
    return batch(self, *arguments)
Loader.batch = slow
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.full
def test_a_slow_host_is_named(mini_corpus, mini_tokenizer, tmp_path):
    """Process 1 takes 0.3 s for a batch, in some threads at a time."""
    config, output = tmp_path / "config.py", tmp_path / "run"
    config.write_text(
        CONFIG.format(corpus=str(mini_corpus), tokenizer=str(mini_tokenizer), stores=str(tmp_path / "stores"))
    )
    alone = [sys.executable, "-m", "aurora_jax", "train", str(config), "--output", str(tmp_path / "alone")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([*alone, "--stop-after", "1"], cwd=ROOT, env=environment, check=True)  # builds the stores
    with socket.socket() as free:
        free.bind(("localhost", 0))
        environment |= {processes.ADDRESS: f"127.0.0.1:{free.getsockname()[1]}", processes.COUNT: "2"}
    command = [sys.executable, "-c", SLOW, str(config), "--output", str(output), "--stop-after", "40"]
    workers = [
        subprocess.Popen(
            command, cwd=ROOT, env={**environment, processes.INDEX: str(number)}, stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    said = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    sentence = " ".join(said[0].split())
    assert re.search(r"process 1 keeps the others waiting: 0\.[0-3]\d+ s of its own a step", sentence), said[0]
    hosts = [row["host_seconds"] for row in read_metrics(output / "metrics.jsonl") if "goodput" in row]
    assert all(slow > 0.2 and quick < 0.1 for quick, slow in hosts[-1:])


HANGS = """
import sys, time
from aurora_jax.cli import main
from aurora_jax.train.program import Program
step, steps, calls = Program.step.func, {}, []
def hanging(program):
    compiled = steps.setdefault(program.tasks, step(program))
    def call(state, batch):
        calls.append(0)
        while len(calls) == 4:
            time.sleep(0.1)
        return compiled(state, batch)
    return call
Program.step = property(hanging)
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_a_step_that_never_ends_is_ended(mini_corpus, mini_tokenizer, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        CONFIG.format(corpus=str(mini_corpus), tokenizer=str(mini_tokenizer), stores=str(tmp_path / "stores"))
    )
    command = [sys.executable, "-c", HANGS, str(config), "--output", str(tmp_path / "run")]
    command += ["--watchdog-minutes", "0.05"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == HUNG, done.stderr[-2000:]
    assert re.search(r"error: step \d has not ended for \d+ s .*process 0 of 1 ends", done.stderr)
    assert "in call" in done.stderr  # where its thread stands


@pytest.mark.full
def test_a_process_that_stands_still_is_named_and_the_run_goes_on(mini_corpus, mini_tokenizer, tmp_path):
    config = tmp_path / "config.py"
    text = CONFIG.format(corpus=str(mini_corpus), tokenizer=str(mini_tokenizer), stores=str(tmp_path / "stores"))
    config.write_text(text)
    whole = [sys.executable, "-m", "aurora_jax", "train", str(config), "--output", str(tmp_path / "alone")]
    subprocess.run(whole, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    output, said = tmp_path / "run", []

    def stand_still(workers):
        while len(losses(output)) < 5:
            assert all(worker.poll() is None for worker in workers)
            time.sleep(0.01)
        workers[1].send_signal(signal.SIGSTOP)
        said.append(workers[0].communicate()[1])
        workers[1].kill()

    statuses = run(config, output, stand_still, "--watchdog-minutes", "1")
    assert statuses == [HUNG, -signal.SIGKILL], said
    assert re.search(r"Silent: process 1 \(\d+ s ago", said[0]), said[0][-2000:]
    assert run(config, output) == [0, 0]
    assert [step for step, *_ in losses(output)] == [step for step, *_ in losses(tmp_path / "alone")]
