"""`launch_tpu.sh` against a gcloud that keeps state (tests/fake_gcloud.py): which commands, in which order,
and what is left in the end.

The hosts' side is real: the code is copied and unpacked, and supervisors run; only `aurora train` and its
environment are stand-ins.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import fake_gcloud
import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SCRIPT = ROOT / "launch_tpu.sh"
PLACE = ["--zone", "us-east5-a", "--project", "p", "--poll", "0.1"]
POD = ["--accelerator-type", "v5p-128", "--spot"]
RUN = ["configs/nano_aurora.py", "--output", "/mnt/b/run", "--seed", "1"]
REAL_GCLOUD = shutil.which("gcloud")


class Launcher:
    """The script with the fake cloud on PATH."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cloud = fake_gcloud.Cloud(folder)
        (folder / "orders").mkdir()
        self.venv = folder / "venv"
        for directory, name, text in (
            (folder / "bin", "gcloud", f'exec {sys.executable} -S {TESTS / "fake_gcloud.py"} "$@"'),
            (folder / "bin", "gcsfuse", 'mkdir -p "$4"'),
            (
                self.venv / "bin",
                "python",
                f'case "$1 $2" in "-m aurora_jax") shift 2; exec {sys.executable} -S {TESTS / "launch_host.py"} "$@";; '
                f'"-c import jax") ;; *) exec {sys.executable} -S "$@";; esac',
            ),
        ):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(f"#!/bin/sh\n{text}\n")
            (directory / name).chmod(0o755)
        # Without the cache of compiled programs that the tests share.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not any(word in name for word in ("_CACHE_", "_COMPILATION_", "_OPTIMIZATIONS"))
        }
        self.environment = {**inherited, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_CLOUD": str(folder)}

    def command(self, verb: str, *words: str) -> list[str]:
        setup = ["--venv", str(self.venv)] if verb in ("setup", "watch") else []
        return [str(SCRIPT), verb, *PLACE, *setup, *words]

    def __call__(self, verb: str, *words: str, status: int = 0) -> str:
        """Runs a verb to its end; stdout and stderr."""
        done = subprocess.run(
            self.command(verb, *words), env=self.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def plan(self, *creations: Mapping) -> None:
        with self.cloud.change() as state:
            state["plans"] = list(creations)

    @property
    def state(self) -> dict:
        with self.cloud.change() as state:
            return state

    def commands(self) -> list[list[str]]:
        path = self.folder / "commands.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """What was asked of the cloud, looks left out, equal neighbours once."""
        found = []
        for command in self.commands():
            words = [word for word in command if not word.startswith("--") and word != "alpha"][2:]
            name = " ".join(words[:2])
            if words[1] == "ssh":
                text = next(word for word in command if word.startswith("--command="))
                name = next(
                    (
                        f"ssh {action}"
                        for action in ("install", "ready", "start", "status", "stop")
                        if f"on-host {action}" in text
                    ),
                    "ssh",
                )
            if words[1] not in ("list", "describe") and found[-1:] != [name]:
                found.append(name)
        return found

    def starts(self) -> list[dict]:
        path = self.folder / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def started(self, count: int) -> list[dict]:
        """Waits for so many starts of `aurora train`, which follow those of their supervisors."""
        while len(self.starts()) < count:
            time.sleep(0.02)
        return self.starts()

    def order(self, code: int, host: str = "all") -> None:
        """`aurora train` on a host ends with this status."""
        (self.folder / "order").write_text(str(code))
        (self.folder / "order").rename(self.folder / "orders" / host)

    @contextlib.contextmanager
    def watching(self, *words: str) -> Iterator[subprocess.Popen]:
        with (self.folder / "watch.log").open("a") as log:
            process = subprocess.Popen(
                self.command("watch", *words), env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def said(self) -> str:
        return (self.folder / "watch.log").read_text()

    def wait(self, process: subprocess.Popen, condition: Callable[[], bool]) -> None:
        while not condition():
            assert process.poll() is None, f"watch ended before what was waited for\n{self.said()}"
            time.sleep(0.02)


@pytest.fixture
def launcher(tmp_path):
    launcher = Launcher(tmp_path)
    yield launcher
    with launcher.cloud.change() as state:
        for name in list(state["nodes"]):
            launcher.cloud.lose(state, name, None)


def is_dead(start: dict) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{start['pid']}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


def test_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, SCRIPT], check=True)


@pytest.mark.parametrize("verb", ["", "up", "setup", "run", "watch", "status", "logs", "ssh", "stop", "down"])
def test_every_verb_explains_itself(verb):
    text = subprocess.run([SCRIPT, *verb.split(), "--help"], check=True, capture_output=True, text=True).stdout
    assert text.startswith(f"usage: launch_tpu.sh {verb or 'VERB'}")
    assert max(map(len, text.splitlines())) <= 140


def test_step_by_step_and_every_verb_twice(launcher):
    launcher.plan({"states": ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]})
    assert "WAITING_FOR_RESOURCES" in launcher("up", *POD)
    assert "is up" in launcher("up", *POD)
    assert "copying the code" in launcher("setup", "--venv", str(launcher.venv))
    copies = launcher.verbs().count("tpu-vm scp")
    assert "set up already" in launcher("setup", "--venv", str(launcher.venv))
    assert launcher.verbs().count("tpu-vm scp") == copies == 1
    for _ in range(2):
        launcher("run", "--env", "EXTRA=a b", "--heartbeat", "30", *RUN)
    status = launcher("status")
    assert "queued resource aurora: ACTIVE, 1 x v5p-128 (spot)" in status
    assert "TPU VM aurora: READY" in status
    assert status.count(" running, since") == 2
    starts = launcher.started(2)
    assert sorted(start["host"] for start in starts) == [
        "aurora-w0",
        "aurora-w1",
    ]  # one on each, however often `run` is said
    for start in starts:
        assert start["arguments"] == ["train", *RUN]
        assert start["environment"] == {"AURORA_DISTRIBUTED": "auto", "AURORA_HEARTBEAT_SECONDS": "30", "EXTRA": "a b"}
    assert "training" in launcher("logs", "--worker", "1")
    assert launcher("ssh", "--worker", "1", "--", "basename ~").strip() == "aurora-w1"
    assert "another run is going on" in launcher("run", *RUN[:-1], "2", status=1)
    for _ in range(2):
        assert launcher("stop").count(" stopped, since") == 2
    assert all(map(is_dead, starts))
    for _ in range(2):
        launcher("down", "--yes")
    assert "ABSENT" in launcher("status")
    state = launcher.state
    assert (state["created"], state["deleted"], state["queued"], state["nodes"]) == (1, 1, None, {})
    create = next(command for command in launcher.commands() if "create" in command)
    assert create == [
        *(
            "compute",
            "tpus",
            "queued-resources",
            "create",
            "aurora",
            "--accelerator-type=v5p-128",
            "--runtime-version=v2-alpha-tpuv5",
        ),
        *("--node-id=aurora", "--spot", "--quiet", "--zone=us-east5-a", "--project=p"),
    ]


def test_a_run_goes_on_over_preemption_and_suspension(launcher):
    """Preempted under an ACTIVE resource, then suspended; deleted, gone, asked for again, set up, resumed;
    down in the end."""
    with launcher.watching("--down", *POD, *RUN) as watch:
        launcher.wait(watch, lambda: len(launcher.starts()) == 2)
        with launcher.cloud.change() as state:
            launcher.cloud.lose(state, "aurora", "PREEMPTED")
        launcher.wait(watch, lambda: len(launcher.starts()) == 4)
        with launcher.cloud.change() as state:
            state["queued"]["to_come"] = ["SUSPENDING", "SUSPENDING", "SUSPENDED"]
            launcher.cloud.lose(state, "aurora", None)
        launcher.wait(watch, lambda: len(launcher.starts()) == 6)
        launcher.order(0)
        assert watch.wait() == 0, launcher.said()
    cycle = [
        "queued-resources create",
        "ssh ready",
        "tpu-vm scp",
        "ssh install",
        "ssh start",
        "queued-resources delete",
    ]
    assert [verb for verb in launcher.verbs() if verb != "ssh status"] == 3 * cycle
    state = launcher.state
    assert (state["created"], state["deleted"], state["queued"], state["nodes"], state["most_nodes"]) == (
        3,
        3,
        None,
        {},
        1,
    )
    assert "the run is done" in launcher.said()


def test_a_watch_that_was_killed_makes_nothing_twice(launcher):
    with launcher.watching(*POD, *RUN) as watch:
        launcher.wait(watch, lambda: len(launcher.starts()) == 2)
    with launcher.watching(*POD, *RUN) as watch, launcher.watching(*POD, *RUN) as second:
        launcher.wait(
            watch, lambda: launcher.verbs().count("ssh status") >= 1 and launcher.said().count("running on 2") >= 2
        )
        launcher.order(0)
        assert watch.wait() == second.wait() == 0, launcher.said()
    assert (launcher.state["created"], launcher.state["deleted"], len(launcher.starts())) == (1, 0, 2)
    assert "still there and cost money" in launcher.said()


def test_no_quota_is_waited_for(launcher):
    refused = {
        "refused": "RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPreemptible' has been exceeded. Limit: 0 in zone us-east5-a."
    }
    failed = {"states": ["PROVISIONING", "FAILED"], "message": "Quota exceeded for TPUV5P"}
    launcher.plan(refused, refused, failed, {})
    with launcher.watching(*POD, *RUN) as watch:
        launcher.wait(watch, lambda: len(launcher.starts()) == 2)
        launcher.order(0)
        assert watch.wait() == 0, launcher.said()
    waits = [line.rsplit(" ", 2)[1] for line in launcher.said().splitlines() if "no quota" in line]
    assert waits == ["0.1", "0.2", "0.4"]
    assert (launcher.state["created"], launcher.state["deleted"]) == (2, 1)
    launcher("down", "--yes")
    launcher.plan(refused)
    assert "there is no quota for 1 x v5p-128 (spot) in us-east5-a: ask for more" in launcher("up", *POD, status=1)
    assert (launcher.state["created"], launcher.state["queued"], launcher.state["nodes"]) == (2, None, {})


def test_one_of_several_slices_fails(launcher):
    """The made ones go with the failed request, and what the cloud forgets to delete is deleted by name."""
    partial = {"states": ["PROVISIONING", "FAILED"], "message": "stockout", "leaves": ["aurora-0"]}
    launcher.plan(partial, {})
    with launcher.watching("--num-slices", "3", *POD, *RUN) as watch:
        launcher.wait(watch, lambda: len(launcher.starts()) == 6)
        launcher.order(0)
        assert watch.wait() == 0, launcher.said()
    assert launcher.verbs()[:4] == [
        "queued-resources create",
        "queued-resources delete",
        "tpu-vm delete",
        "queued-resources create",
    ]
    assert [
        "compute",
        "tpus",
        "tpu-vm",
        "delete",
        "aurora-0",
        "--quiet",
        "--zone=us-east5-a",
        "--project=p",
    ] in launcher.commands()
    assert launcher.state["most_nodes"] == 3
    for start in launcher.starts():
        assert start["environment"] == {
            "AURORA_DISTRIBUTED": "auto",
            "AURORA_HEARTBEAT_SECONDS": "100",
            "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.2:8081",
            "MEGASCALE_NUM_SLICES": "3",
            "MEGASCALE_PORT": "8081",
            "MEGASCALE_SLICE_ID": start["host"].split("-")[1],
        }
    launcher("down", "--yes")
    launcher.plan(partial)
    assert "came to nothing (FAILED: stockout) and was deleted" in launcher("up", "--num-slices", "3", *POD, status=1)
    assert (launcher.state["queued"], launcher.state["nodes"]) == (None, {})


def test_a_host_that_does_not_answer(launcher):
    launcher("up", *POD)
    launcher("setup", "--venv", str(launcher.venv))
    with launcher.cloud.change() as state:
        state["silent"] = [["aurora", 1]]
    assert "failed on: aurora" in launcher("run", *RUN, status=1)
    assert [start["host"] for start in launcher.started(1)] == ["aurora-w0"]
    with launcher.watching(*POD, *RUN) as watch:
        launcher.wait(watch, lambda: "not all hosts answer" in launcher.said())
        with launcher.cloud.change() as state:
            state["silent"] = []
        launcher.wait(watch, lambda: len(launcher.starts()) == 2)
        launcher.order(0)
        assert watch.wait() == 0
    assert sorted(start["host"] for start in launcher.starts()) == ["aurora-w0", "aurora-w1"]
    assert (launcher.state["created"], launcher.state["deleted"]) == (1, 0)


def test_a_request_that_was_made_without_our_hearing(launcher):
    launcher.plan({"unheard": True})
    with launcher.watching(*POD, *RUN) as watch:
        launcher.wait(watch, lambda: len(launcher.starts()) == 2)
    assert launcher.state["created"] == 1
    assert "the request was refused; asking again" in launcher.said()


def test_another_request_of_the_name_is_left_alone(launcher):
    launcher("up", *POD)
    assert "is 1 x v5p-128 (spot), and you ask for 1 x v6e-256 (on-demand)" in launcher(
        "up", "--accelerator-type", "v6e-256", status=2
    )
    assert "'my-aurora'" not in str(launcher.state)
    assert (launcher.state["created"], launcher.state["deleted"]) == (1, 0)


def test_wrong_input_ends_the_run_everywhere(launcher):
    launcher.order(2, "aurora-w1")
    with launcher.watching(*POD, *RUN) as watch:
        assert watch.wait() == 2
    assert "wrong input" in launcher.said()
    assert all(map(is_dead, launcher.starts()))
    assert len(launcher.starts()) == 2


def test_a_stop_ends_the_watch_too(launcher):
    with launcher.watching(*POD, *RUN) as watch:
        launcher.wait(watch, lambda: len(launcher.starts()) == 2)
        launcher("stop")
        assert watch.wait() == 0
    assert "stopped by `stop`" in launcher.said()
    assert len(launcher.starts()) == 2


def test_a_host_that_ended_before_the_others_joins_them_again(launcher):
    """Its last checkpoint is shared, so it ends at once; without it the others would wait for it for ever."""
    launcher.order(0, "aurora-w0")
    with launcher.watching(*POD, *RUN) as watch:
        launcher.wait(watch, lambda: [start["host"] for start in launcher.starts()].count("aurora-w0") >= 2)
        assert [start["host"] for start in launcher.starts()].count("aurora-w1") == 1
        launcher.order(0)
        assert watch.wait() == 0, launcher.said()


DRY = [
    (
        ["watch", *PLACE, "--spot", "--accelerator-type", "v5p-128", *RUN],
        [
            "queued-resources list",
            "tpu-vm list",
            "queued-resources create",
            "tpu-vm ssh",
            "git",
            "tpu-vm scp",
            "tpu-vm ssh",
            "tpu-vm ssh",
        ],
    ),
    (
        ["up", *PLACE, "--accelerator-type", "v6e-256", "--num-slices", "2"],
        ["queued-resources list", "tpu-vm list", "queued-resources create"],
    ),
    (
        ["down", *PLACE],
        ["queued-resources list", "tpu-vm list", "queued-resources delete", "queued-resources list", "tpu-vm list"],
    ),
    (["stop", *PLACE], ["queued-resources list", "tpu-vm ssh"]),
    (["logs", "--follow", *PLACE], ["queued-resources list", "tpu-vm ssh"]),
    (["run", "--hosts", "a,me@b", *RUN], ["ssh", "ssh"]),
]


@pytest.mark.parametrize(("words", "expected"), DRY, ids=[words[0] + words[1] for words, _ in DRY])
def test_dry_run_prints_and_does_nothing(launcher, words, expected):
    for name in ("gcloud", "ssh", "scp", "git"):
        trap = launcher.folder / "bin" / name
        real = shutil.which(name) if name == "git" else None
        trap.write_text(
            f'#!/bin/sh\ncase "$*" in *rev-parse*|*cat-file*|*status*) exec {real} "$@";; esac\ntouch '
            f"{launcher.folder}/executed\n"
        )
        trap.chmod(0o755)
    command = [SCRIPT, words[0], "--dry-run", *words[1:]]
    done = subprocess.run(command, env=launcher.environment, capture_output=True, text=True, check=True)
    assert not (launcher.folder / "executed").exists()
    found = [line.replace(" alpha", "").removeprefix("gcloud compute tpus ") for line in done.stdout.splitlines()]
    assert [next((name for name in expected if line.startswith(name)), line) for line in found][
        : len(expected)
    ] == expected


@pytest.mark.skipif(REAL_GCLOUD is None, reason="the Google Cloud CLI is not installed: its own parser cannot be asked")
def test_googles_own_parser_accepts_every_command(launcher):
    """What the script prints, through the parser of the real gcloud; and the fake's idea of the formats
    through its real formatter."""
    lines = []
    for words, _ in [*DRY, (["run", *PLACE, "--num-slices", "2", *RUN], []), (["ssh", *PLACE, "--worker", "3"], [])]:
        words = [words[0], "--dry-run", *words[1:]]
        out = subprocess.run(
            [SCRIPT, *words], env=launcher.environment, capture_output=True, text=True, check=True
        ).stdout
        lines += [line for line in out.splitlines() if line.startswith("gcloud ")]
    environment = {
        **os.environ,
        "CLOUDSDK_CONFIG": str(launcher.folder / "config"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }
    (launcher.folder / "commands.json").write_text(
        json.dumps([{"command_string": line} for line in dict.fromkeys(lines)])
    )
    lint = [REAL_GCLOUD, "meta", "lint-gcloud-commands", f"--commands-file={launcher.folder / 'commands.json'}"]
    answers = json.loads(subprocess.run(lint, env=environment, capture_output=True, text=True, check=True).stdout)
    answers = [answer for group in answers.values() for answer in group] if isinstance(answers, dict) else answers
    assert len(answers) == len(set(lines)) >= 12
    for answer in answers:
        assert answer["success"], (answer["command_string"], answer["error_message"])
    queued = {
        "name": "projects/p/locations/z/queuedResources/aurora",
        "spot": {},
        "tpu": {"nodeSpec": [{"multisliceParams": {"nodeCount": 2}, "node": {"acceleratorType": "v5p-128"}}]},
        "state": {"state": "FAILED", "failedData": {"error": {"message": "no chips"}}},
    }
    reserved = {
        **queued,
        "guaranteed": {"reserved": True},
        "state": {"state": "ACTIVE"},
        "tpu": {"nodeSpec": [{"node": {"acceleratorType": "v4-8"}}]},
    }
    del reserved["spot"]
    others = [
        {**queued, "name": f"projects/p/locations/z/queuedResources/{name}"} for name in ("my-aurora", "aurora-2")
    ]
    nodes = [
        {"name": f"projects/p/locations/z/nodes/{name}", "state": "READY"}
        for name in ("aurora", "aurora-0", "aurora-x", "my-aurora")
    ]
    filters = {
        name: next(shlex.split(line) for line in lines if f"{name} list" in line)
        for name in ("queued-resources", "tpu-vm")
    }
    for name, resources, expected in (
        ("queued-resources", [queued, reserved, *others], ["FAILED|v5p-128|2|e30=||no chips", "ACTIVE|v4-8|||True|"]),
        ("tpu-vm", nodes, ["aurora|READY", "aurora-0|READY"]),
    ):
        flags = [word for word in filters[name] if word.startswith(("--filter", "--format"))]
        (launcher.folder / "list.json").write_text(json.dumps(resources))
        listing = [REAL_GCLOUD, "meta", "list-from-json", str(launcher.folder / "list.json"), *flags]
        assert (
            subprocess.run(listing, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
            == expected
        )
