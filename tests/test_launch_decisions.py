"""What the launcher knows without a cloud: what `watch` decides, what a line says, which words are options;
and what it may import."""

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aurora_jax.launch.command_line import divide, read
from aurora_jax.launch.commands import Commands, Stop
from aurora_jax.launch.decision import CloudAction, HostsAction, Limits, Memory, about_cloud, about_hosts
from aurora_jax.launch.progress import Newest
from aurora_jax.launch.states import HostState, HostStatus, Node, NodeHealth, QueuedResource, health_of

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "aurora_jax" / "launch").glob("*.py"))
NEVER = Limits(None, None)


def host(state: str, step: int | None = None, fruitless: int = 0, name: str = "a") -> HostStatus:
    return HostStatus(name, HostState(state), newest=Newest(step), fruitless=fruitless)


def look(*hosts: HostStatus, memory: Memory, limits: Limits = NEVER) -> tuple[HostsAction, Memory]:
    return about_hosts(hosts, all_answered=True, asked=0.0, now=0.0, memory=memory, limits=limits)


def silence(asked: float, now: float, memory: Memory, limits: Limits) -> tuple[HostsAction, Memory]:
    return about_hosts([], all_answered=False, asked=asked, now=now, memory=memory, limits=limits)


@pytest.mark.parametrize(
    ("line", "nodes", "expected"),
    [
        ("", [], CloudAction.ASK),
        ("", ["READY"], CloudAction.CLEAR),
        ("ACCEPTED|v5p-128||||", [], CloudAction.WAIT),
        ("SUSPENDING|v5p-128||||", [], CloudAction.WAIT),
        ("DELETING|v5p-128||||", ["DELETING"], CloudAction.WAIT),
        ("A_STATE_OF_TOMORROW|v5p-128||||", [], CloudAction.WAIT),
        ("SUSPENDED|v5p-128||||", ["PREEMPTED"], CloudAction.DELETE),
        ("FAILED|v5p-128||||stockout", [], CloudAction.DELETE),
        ("FAILED|v5p-128||||Quota limit | exceeded", [], CloudAction.DELETE_FOR_QUOTA),
        ("ACTIVE|v5p-128||||", ["CREATING"], CloudAction.WAIT),
        ("ACTIVE|v5p-128|2|||", ["CREATING", "PREEMPTED"], CloudAction.DELETE),
        ("ACTIVE|v5p-128|2|||", ["READY", "gone"], CloudAction.DELETE),
        ("ACTIVE|v5p-128|2|||", ["READY", "READY"], CloudAction.LOOK_AT_HOSTS),
    ],
)
def test_what_is_done_about_the_cloud(line, nodes, expected):
    found = [Node(str(number), state) for number, state in enumerate(nodes)]
    assert about_cloud(QueuedResource.parse(line), bool(nodes), health_of(found), Memory(), NEVER) is expected


def test_a_line_of_the_cloud():
    assert QueuedResource.parse("ACTIVE|v5p-128|3|e30=||").description == "3 x v5p-128 (spot)"
    assert QueuedResource.parse("ACTIVE|v4-8|||True|").description == "1 x v4-8 (reserved)"
    assert QueuedResource.parse("FAILED|v4-8||||no | chips").reason == "no | chips"


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ("none none", HostsAction.START),
        ("running none", HostsAction.START),
        ("running dead", HostsAction.START),
        ("interrupted waiting", HostsAction.START),
        ("running waiting", HostsAction.GO_ON),
        ("done done", HostsAction.DONE),
        ("failed other", HostsAction.OTHER_RUN),
        ("failed running", HostsAction.WRONG_INPUT),
        ("stopped done", HostsAction.STOPPED),
    ],
)
def test_what_is_done_about_the_hosts(states, expected):
    assert look(*map(host, states.split()), memory=Memory())[0] is expected


def test_hosts_that_are_done_alone_for_long_start_again():
    memory, actions = Memory(), []
    for _ in range(4):
        action, memory = look(host("done"), host("running"), memory=memory)
        actions.append(action)
    assert actions == [HostsAction.GO_ON, HostsAction.GO_ON, HostsAction.START_AGAIN, HostsAction.GO_ON]


def test_starts_without_a_new_checkpoint_are_counted_over_hosts_and_over_lost_vms():
    limits = Limits(fruitless_starts=4)
    _, memory = look(host("running"), memory=Memory().after_start(well=True), limits=limits)
    memory = memory.after_loss().after_start(well=True)  # one, preempted
    action, memory = look(host("running", fruitless=1), host("waiting", fruitless=2), memory=memory, limits=limits)
    assert (action, memory.fruitless) == (HostsAction.GO_ON, 3)
    assert look(host("waiting", fruitless=3), memory=memory, limits=limits)[0] is HostsAction.NO_PROGRESS
    assert look(host("waiting", fruitless=3), memory=memory, limits=NEVER)[0] is HostsAction.GO_ON
    # The run being done is what counts in the end.
    assert look(host("done", fruitless=3), memory=memory, limits=limits)[0] is HostsAction.DONE
    lost = memory.after_loss()
    absent = QueuedResource.parse("")
    assert about_cloud(absent, False, NodeHealth.READY, lost, limits) is CloudAction.GIVE_UP
    assert about_cloud(absent, True, NodeHealth.READY, lost, limits) is CloudAction.CLEAR
    # A checkpoint, and all is forgotten, but not by one that is seen again.
    action, memory = look(host("running", step=100), memory=memory, limits=limits)
    assert (action, memory.fruitless) == (HostsAction.GO_ON, 0)
    assert memory.after_loss().fruitless == 0  # the start that made it was none for nothing
    memory = memory.after_loss().after_start(well=True).after_loss().after_start(well=True)
    assert look(host("running", step=100), memory=memory, limits=limits)[1].fruitless == 1
    assert look(host("running", step=None), memory=memory, limits=limits)[1].newest == 100
    assert look(host("running", step=101), memory=memory, limits=limits)[1].fruitless == 0


def test_a_start_that_does_not_come_about_counts():
    memory = Memory()
    for _ in range(3):
        action, memory = look(host("none"), memory=memory, limits=Limits(fruitless_starts=3))
        assert action is HostsAction.START
        memory = memory.after_start(well=False)
    assert look(host("none"), memory=memory, limits=Limits(fruitless_starts=3))[0] is HostsAction.NO_PROGRESS
    # Of a pod that is being taken away the hosts may go before the cloud says so.
    assert Memory().after_start(well=True).after_start(well=False).after_loss().fruitless == 1
    # The start before has made a checkpoint: it was for something, and the one after it is not blamed for the
    # loss of the pod.
    _, memory = look(host("none"), host("running", step=50), memory=Memory(newest=40, lost=1).after_start(well=True))
    memory = memory.after_start(well=False)
    assert memory.after_loss().fruitless == 0
    assert memory.after_start(well=False).after_loss().fruitless == 1


def test_hosts_that_cannot_say_where_the_run_is_are_not_counted_while_it_runs():
    unknown = replace(host("running"), newest=None)
    memory = replace(Memory(), lost=5, begun=True)
    assert look(unknown, memory=memory, limits=Limits(fruitless_starts=5))[0] is HostsAction.GO_ON
    assert (
        look(unknown, host("running", step=None), memory=memory, limits=Limits(fruitless_starts=5))[0]
        is HostsAction.NO_PROGRESS
    )


def test_an_unreachable_host_is_given_up_after_the_stated_time():
    limits = Limits(unreachable=100.0)
    action, memory = silence(0.0, 20.0, Memory(), limits)
    assert action is HostsAction.GO_ON
    assert silence(60.0, 99.0, memory, limits)[0] is HostsAction.GO_ON
    assert silence(60.0, 100.0, memory, limits)[0] is HostsAction.UNREACHABLE
    assert silence(0.0, 100.0, Memory(), limits)[0] is HostsAction.UNREACHABLE  # one look that lasts
    assert silence(60.0, 1e9, memory, NEVER)[0] is HostsAction.GO_ON
    _, answered = look(host("running"), memory=memory, limits=limits)
    assert silence(90.0, 110.0, answered, limits)[0] is HostsAction.GO_ON
    assert silence(90.0, 110.0, memory.after_loss(), limits)[0] is HostsAction.GO_ON


def test_a_line_of_a_host():
    head = "[n-0] aurora-status w1 "
    facts = (
        "since 2026-11-25 04:00:00 UTC, start 7, code 0123456789ab, checkpoint 1200 (code ba9876543210), "
        "2 starts without a new one"
    )
    line = f"{head}waiting, {facts}, last exit status 1, log: x, checkpoint 9, code f, 8 starts without a new one"
    assert HostStatus.parse(line) == HostStatus(
        "w1", HostState.WAITING, line, "0123456789ab", Newest(1200, "ba9876543210"), 2
    )
    assert HostStatus.parse(f"{head}none, not set up") == HostStatus("w1", HostState.NONE, f"{head}none, not set up")
    new = HostStatus.parse(f"{head}none, checkpoint none")
    assert new is not None
    assert (new.code, new.newest) == (None, Newest(None))
    old = HostStatus.parse(
        f"{head}running, since 2026-11-25 04:00:00 UTC, start 1, log: training"
    )  # of hosts set up by older code
    assert old is not None
    assert (old.state, old.code, old.newest, old.fruitless) == (HostState.RUNNING, None, None, 0)
    other = HostStatus.parse(f"{head}other, since 2026-11-25 04:00:00 UTC, start 1, code 0123456789ab")
    assert other is not None
    assert other.code is None  # another run's
    assert HostStatus.parse("[n-0] Warning: Permanently added 'w1'") is None


def test_words_after_the_config_are_not_ours():
    words = [
        "watch",
        "--create-flag",
        "--network=default",
        "--ssh-options=-v",
        "--spot",
        "configs/x.py",
        "--name",
        "theirs",
        "--help",
    ]
    options = ["--create-flag=--network=default", "--ssh-options=-v", "--spot"]
    assert divide(words) == ("watch", options, ["configs/x.py", "--name", "theirs", "--help"])
    assert divide(["--name", "x", "ssh", "--", "--help"]) == ("ssh", ["--name=x"], ["--help"])
    for wrong in (["up", "--spto"], ["up", "--spot=1"], ["up", "--zone"], ["upp"]):
        with pytest.raises(Stop):
            divide(wrong)
    assert read("stop", ["--hosts=a,me@b"], []).hosts == ("a", "me@b")
    with pytest.raises(Stop, match="a is there twice"):
        read("stop", ["--hosts=a,b,a"], [])


def test_a_command_that_hangs_is_ended_with_what_it_has_started():
    answer = Commands(dry_run=False).everywhere(
        {"a": ["sh", "-c", "echo begun; sleep 1000 & wait"], "b": ["echo", "well"], "c": ["false"]}, limit=0.5
    )
    assert sorted(answer.lines) == ["[a] begun", "[b] well"]
    assert answer.failed == ["a", "c"]


def test_only_the_standard_library_is_imported():
    # The package's own file comes with them: what it imports besides, it imports when a name of the face is used.
    for path in (*MODULES, ROOT / "aurora_jax" / "__init__.py"):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert not node.level, path
                names = [str(node.module)]
            for name in names:
                allowed = ("aurora_jax.launch.",) if path in MODULES else ("aurora_jax.",)
                assert name.split(".")[0] in sys.stdlib_module_names or f"{name}.".startswith(allowed), (
                    f"{path.name}: {name}"
                )


def test_it_runs_without_any_installed_package():
    names = [f"aurora_jax.launch.{path.stem}" for path in MODULES if path.stem not in ("__init__", "__main__")]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(names)}\n"
        "print(*{name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"aurora_jax", "__main__"}
