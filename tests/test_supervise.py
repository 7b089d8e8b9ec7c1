"""The supervisor of one host, with real processes and signals."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aurora_jax import errors
from aurora_jax.launch import supervise as supervise_module
from aurora_jax.launch.supervise import Status, is_locked

ROOT = Path(__file__).resolve().parents[1]


def supervise(action: str, directory: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", "-m", "aurora_jax.launch.supervise", action, str(directory), *words]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition) -> None:
    while not condition():
        time.sleep(0.02)


@pytest.fixture
def directory(tmp_path):
    yield tmp_path / "run"
    supervise("stop", tmp_path / "run")


def test_restarts_with_growing_pauses_until_it_is_done(directory, tmp_path):
    count = tmp_path / "count"
    script = f"echo x >> {count}; echo start $(wc -l < {count}); [ $(wc -l < {count}) -ge 4 ]"
    done = supervise("run", directory, "--pause", "0.1", "--", "bash", "-c", script)
    assert done.returncode == 0
    assert [line.split(" start ")[1] for line in done.stdout.splitlines()] == [
        *(f"{number} ended with status 1: waiting" for number in (1, 2, 3)),
        "4 ended with status 0: done",
    ]
    logs = sorted((directory / "logs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    pauses = [later.stat().st_mtime - earlier.stat().st_mtime for earlier, later in itertools.pairwise(logs)]
    assert [pause >= 0.1 * 2**number for number, pause in enumerate(pauses)] == [True] * 3
    assert [log.read_text().splitlines()[1] for log in logs] == [f"start {number}" for number in (1, 2, 3, 4)]
    assert (directory / "log").resolve() == logs[-1]
    assert "done, since" in supervise("status", directory).stdout
    assert "start 4" in supervise("start", directory, "--", "bash", "-c", script).stdout  # done already
    assert count.read_text().count("x") == 4
    supervise("start", directory, "--again", "--", "bash", "-c", script)
    wait_for(lambda: count.read_text().count("x") == 5)


def test_wrong_input_is_not_tried_again(directory):
    done = supervise("run", directory, "--", "bash", "-c", "echo error: no such file; exit 2")
    assert done.returncode == 1
    assert Status(directory).state == "failed"
    assert "log: error: no such file" in Status(directory).line()


def test_a_command_that_does_not_end_is_killed_after_the_grace(directory):
    supervise(
        "start",
        directory,
        "--grace",
        "0.5",
        "--",
        "bash",
        "-c",
        "trap '' TERM; echo deaf; while true; do sleep 0.1; done",
    )
    wait_for(lambda: "deaf" in Status(directory).line())
    assert " stopped, since" in supervise("stop", directory).stdout
    assert Status(directory).values["exit"] == 128 + signal.SIGKILL


def test_a_sigterm_of_the_system_is_not_a_stop_of_the_user(directory):
    supervise("start", directory, "--", "sleep", "1000")
    os.kill(Status(directory).values["pid"], signal.SIGTERM)
    wait_for(lambda: not is_locked(directory))
    assert Status(directory).state == "interrupted"


def test_a_command_that_has_lost_its_supervisor_saves_and_no_second_one_starts_meanwhile(directory, tmp_path):
    script = (
        f"trap 'sleep 1; echo saved > {tmp_path}/saved; exit 143' TERM; echo ready; while true; do sleep 0.05; done"
    )
    words = ["--", "bash", "-c", script]
    supervise("start", directory, *words)
    wait_for(lambda: "ready" in Status(directory).line())
    os.kill(Status(directory).values["pid"], signal.SIGKILL)
    assert " running, since" in supervise("start", directory, *words).stdout
    assert not (tmp_path / "saved").exists()
    wait_for(lambda: not is_locked(directory))
    assert (tmp_path / "saved").exists()
    assert Status(directory).state == "dead"
    assert len(list((directory / "logs").iterdir())) == 1
    supervise("start", directory, *words)
    wait_for(lambda: len(list((directory / "logs").glob("*.log"))) == 2)


def test_exit_statuses_are_those_of_the_command_line():
    """The launcher imports nothing of the rest, and has its own copies."""
    for name in ("BAD_INPUT", "DIVERGED", "CHIP_FAULT"):
        assert getattr(supervise_module, name) == getattr(errors, name)


@pytest.mark.parametrize("status", [2, 5, 6])
def test_what_would_end_in_the_same_way_is_not_started_again(directory, status):
    done = supervise("run", directory, "--pause", "0.1", "--", "bash", "-c", f"exit {status}")
    assert done.stdout.count(" start ") == 1
    assert Status(directory).state == "failed"
