"""When `watch` gives up and what it says then, and the code that a run keeps, against the cloud of
tests/fake_gcloud.py."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from test_launch import POD, ROOT, RUN, SCRIPT, Launcher

CODE = ["launch_tpu.sh", "aurora_jax/__init__.py", "aurora_jax/launch", "configs/nano_aurora.py"]
PINS = ["requirements.txt", "constraints.txt", "pyproject.toml"]


class Watched(Launcher):
    """The script, or a copy of it in a repository of its own, whose HEAD moves; runs write below the folder."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.script = SCRIPT
        self.output = folder / "output"
        self.run = [RUN[0], "--output", str(self.output)]

    def command(self, verb: str, *words: str) -> list[str]:
        return [str(self.script), *super().command(verb, *words)[1:]]

    def git(self, *words: str) -> str:
        name = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        done = subprocess.run(
            ["git", "-C", self.script.parent, *name, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def own_repository(self) -> None:
        repository = self.folder / "repository"
        for name in (*CODE, *PINS):
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, repository / name)
        shutil.rmtree(repository / "aurora_jax/launch/__pycache__", ignore_errors=True)
        self.script = repository / "launch_tpu.sh"
        self.git("init", "--quiet")
        self.commit()

    def commit(self) -> str:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", "x")
        return self.git("rev-parse", "HEAD")

    def checkpoint(self, step: int, revision: str | None = None) -> None:
        """What a run leaves behind, as far as the launcher looks."""
        new = self.output / "new"
        for item in ("params", "metadata", "run"):
            (new / item).mkdir(parents=True)
        (new / "_CHECKPOINT_METADATA").touch()
        (new / "run" / "metadata").write_text(json.dumps({"seed": 0} | ({"revision": revision} if revision else {})))
        (self.output / "checkpoints").mkdir(exist_ok=True)
        new.rename(self.output / "checkpoints" / str(step))

    def lose(self, becomes: str | None = "PREEMPTED") -> None:
        with self.cloud.change() as state:
            self.cloud.lose(state, "aurora", becomes)

    def nothing_left(self) -> None:
        """The cloud has taken back all, while nobody looked."""
        self.lose(None)
        with self.cloud.change() as state:
            state["queued"] = None

    def looked(self) -> int:
        return sum("on-host status" in str(command) for command in self.commands())

    def wait_for_looks(self, watch: subprocess.Popen, count: int = 4) -> None:
        """Two that a start takes for itself, one that was under way and may have seen less than what is there
        now, and one that has not."""
        looked = self.looked()
        self.wait(watch, lambda: self.looked() >= looked + count)

    def codes(self) -> set[str]:
        return {path.read_text().strip() for path in (self.folder / "hosts").glob("*/aurora/code/COMMIT")}


@pytest.fixture
def watched(tmp_path):
    watched = Watched(tmp_path)
    yield watched
    with watched.cloud.change() as state:
        for name in list(state["nodes"]):
            watched.cloud.lose(state, name, None)


def test_a_run_that_fails_without_a_new_checkpoint_is_given_up(watched):
    watched.checkpoint(100)
    watched.order(1)
    with watched.watching("--fruitless-starts", "1", *POD, *watched.run) as watch:
        assert watch.wait() == 3, watched.said()
    said = watched.said()
    assert "giving up: 1 starts in a row ended without a new checkpoint" in said
    assert "still there and cost money: 1 x v5p-128 (spot), ACTIVE, TPU VM aurora READY: " in said
    assert "`launch_tpu.sh down --name aurora --zone=us-east5-a --project=p` deletes them" in said
    assert (watched.state["deleted"], set(watched.state["nodes"])) == (0, {"aurora"})
    status = watched("status")
    assert status.count(" stopped, since") == 2
    assert status.count(", checkpoint 100, 1 starts without a new one, last exit status 1,") == 2


def test_a_run_that_makes_checkpoints_is_not_and_one_that_is_taken_away_too_soon_is(watched):
    with watched.watching("--fruitless-starts", "2", *POD, *watched.run) as watch:
        for step, starts in ((None, 2), (50, 4), (None, 6), (None, 8)):
            watched.wait(watch, lambda starts=starts: len(watched.starts()) == starts)
            if step:
                watched.checkpoint(step)
                watched.wait_for_looks(watch)
            watched.lose()
        assert watch.wait() == 3, watched.said()
    assert "giving up: 2 starts in a row ended without a new checkpoint" in watched.said()
    assert "nothing of aurora is there any more that costs money" in watched.said()
    assert (watched.state["created"], watched.state["queued"], watched.state["nodes"]) == (4, None, {})


def test_a_host_that_stays_unreachable_is_given_up(watched):
    with watched.watching(*POD, *watched.run) as watch:
        watched.wait(watch, lambda: len(watched.starts()) == 2)
    with watched.cloud.change() as state:
        state["silent"] = [["aurora", 1]]
    with watched.watching("--unreachable", "3", *POD, *watched.run) as watch:
        assert watch.wait() == 4, watched.said()
    said = watched.said()
    assert "giving up: not all hosts have answered for 3 s (aurora); nothing was stopped" in said
    assert "Connection timed out" in said
    assert "still there and cost money" in said
    with watched.cloud.change() as state:
        state["silent"] = []
    assert watched("status").count(" running, since") == 2


def test_the_code_of_the_first_setup_stays_until_a_hash_moves_it(watched):
    watched.own_repository()
    first = watched.git("rev-parse", "HEAD")
    watch_words = [*POD, *watched.run]

    with watched.watching(*watch_words) as watch:
        watched.wait(watch, lambda: len(watched.starts()) == 2)
    second = watched.commit()
    with watched.watching("--commit", "HEAD", *watch_words) as watch:
        watched.wait(watch, lambda: f"keeps the code at {first[:12]}" in watched.said())  # by what the hosts say
        watched.lose()
        watched.wait(watch, lambda: len(watched.starts()) == 4)  # by what the watch remembers
    assert watched.codes() == {first}
    assert f"going on with the code at {first[:12]}" in watched("watch", "--commit", second, *watch_words, status=2)
    watched.nothing_left()
    watched.checkpoint(7, first)
    with watched.watching(*watch_words) as watch:
        watched.wait(watch, lambda: len(watched.starts()) == 6)  # by what the checkpoint says
    assert watched.codes() == {first}
    watched.nothing_left()
    moves = f"the newest checkpoint is of the code at {first[:12]}; the run moves to {second[:12]}"
    with watched.watching("--commit", second[:12], *watch_words) as watch:
        watched.wait(watch, lambda: moves in watched.said())
    assert watched.codes() == {second}
    watched.nothing_left()
    watched.checkpoint(8, "f" * 40)
    assert f"has the code at {'f' * 12}, which is not in this repository" in watched("watch", *watch_words, status=2)


def test_wrong_limits_are_refused(watched):
    for flag, value in (("--fruitless-starts", "-1"), ("--fruitless-starts", "many"), ("--unreachable", "1h")):
        assert f"{flag} {value}: " in watched("watch", flag, value, *POD, *watched.run, status=2)
