"""A real run over several hosts: `launch_tpu.sh --hosts`, ssh, `jax.distributed` over gloo, a cable that is
pulled out."""

import os
import subprocess
import sys
import time
from pathlib import Path

import network_hosts
import pytest

from aurora_jax.evaluate.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[1]
WHY_NOT = network_hosts.missing()
STEPS = 60


class Hosts:
    """The launcher's command line on two network hosts."""

    def __init__(self, network: network_hosts.NetworkHosts):
        self.network = network
        self.options = ["--hosts", ",".join(network.addresses), "--ssh-options", f"-F {network.ssh_config}"]

    def __call__(self, verb: str, *words: str, status: int = 0) -> str:
        command = self.network.in_launcher(str(ROOT / "launch_tpu.sh"), verb, *self.options, *words)
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def check(self) -> None:
        """Fails, with what the hosts have logged, where one starts again and again."""
        for home in self.network.homes:
            if (home / "aurora/run/supervisor.log").read_text().count(": waiting") > 5:
                raise AssertionError(
                    "\n".join(
                        (each / "aurora/run/log").read_text(errors="replace")[-3000:] for each in self.network.homes
                    )
                )

    def wait_for(self, *states: str) -> str:
        """Waits until every host is in one of the states."""
        while True:
            lines = [line for line in self("status").splitlines() if " since " in line]
            assert "failed" in states or not any(" failed" in line for line in lines), lines
            self.check()
            if len(lines) == self.network.count and all(line.split()[2].rstrip(",") in states for line in lines):
                return "\n".join(lines)
            time.sleep(1)


def losses(run: Path) -> list[tuple]:
    rows = (
        [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
        if (run / "metrics.jsonl").exists()
        else []
    )
    return [(row["step"], row["loss"], row["gradient_norm"], tuple(row["task_loss"].items())) for row in rows]


@pytest.mark.full
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_a_host_is_cut_off_and_the_losses_are_those_of_an_undisturbed_run(mini_corpus, tmp_path, record_property):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    base = tmp_path / "nano"
    convert = [sys.executable, "-m", "convert", "from-torch", "examples/nano", str(base), "--dtype", "float32"]
    subprocess.run(convert, cwd=ROOT, env=environment, check=True)
    config = ["configs/nano_aurora.py", "--initial-checkpoint", str(base), "--data.corpus", str(mini_corpus)]
    config += [
        "--data.stores",
        str(tmp_path / "stores"),
        "--evaluation.tasks",
        "sample_en",
        "sample_fi",
        "--evaluation.keep",
        "sample_en",
        "--checkpoint.every",
        "20",
    ]
    # One process by itself builds the stores, which the hosts then share; it stops after its first step.
    alone = [
        sys.executable,
        "-m",
        "aurora_jax",
        "train",
        *config,
        "--output",
        str(tmp_path / "alone"),
        "--stop-after",
        "1",
    ]
    subprocess.run(alone, cwd=ROOT, env=environment, check=True)
    config += ["--stop-after", str(STEPS)]
    run_options = ["--env", "JAX_PLATFORMS=cpu", "--env", "OMP_NUM_THREADS=1", "--heartbeat", "10"]

    with network_hosts.NetworkHosts(tmp_path, 2).up() as network:
        launch = Hosts(network)
        launch("setup", "--venv", sys.prefix)
        assert (
            "set up already"
            in subprocess.run(
                network.in_launcher(str(ROOT / "launch_tpu.sh"), "setup", *launch.options, "--venv", sys.prefix),
                capture_output=True,
                text=True,
            ).stderr
        )

        refused = [*run_options, *config, "--output", "runs/on_each_host"]
        launch("run", *refused)
        launch.wait_for("failed")
        for number in range(2):
            assert "not storage that all hosts share" in launch("logs", "--worker", str(number))

        begun = time.monotonic()
        launch("run", *run_options, *config, "--output", str(tmp_path / "undisturbed"))
        launch.wait_for("done")
        record_property("undisturbed seconds", round(time.monotonic() - begun))
        assert len(losses(tmp_path / "undisturbed")) == STEPS

        run = tmp_path / "cut"
        begun = time.monotonic()
        for _ in range(2):
            launch("run", *run_options, *config, "--output", str(run))
        while len(losses(run)) < 30:
            time.sleep(0.2)
        network.link(1, "down")
        pulled = time.monotonic()
        died = {}
        while len(died) < 2:
            for number, home in enumerate(network.homes):
                if (
                    number not in died
                    and "start 1 ended" in (home / "aurora/run/supervisor.log").read_text().split("status 0: done")[-1]
                ):
                    died[number] = time.monotonic() - pulled
            time.sleep(0.1)
        assert len(losses(run)) < STEPS
        network.link(1, "up")
        back = time.monotonic()
        before = len(losses(run))
        status = launch.wait_for("done")
        record_property("steps before the cut", before)
        record_property(
            "seconds from the cut to each host's exit", {number: round(seconds, 1) for number, seconds in died.items()}
        )
        record_property("seconds from the cable's return to the end", round(time.monotonic() - back))
        record_property("cut run, seconds", round(time.monotonic() - begun))
        print(status)
        assert max(died.values()) < 60, died
        assert losses(run) == losses(tmp_path / "undisturbed")
        for home in network.homes:
            assert "start 2" in (home / "aurora/run/supervisor.log").read_text()
