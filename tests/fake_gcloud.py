"""A gcloud that keeps TPUs in a folder: run as `gcloud` by tests/test_launch.py, which also reads and changes
its state.

A queued resource goes through the states that the plan has for its creation, one at each look. Its TPU VMs
have hosts, which are folders that serve as home; what is run on one "by ssh" is run there. Messages are
worded as the real ones are.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

QUEUED_FORMAT = (
    'value[separator="|"](state.state,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec[0].multisliceParams.nodeCount,'
    "spot.encode(base64),guaranteed.reserved,state.failedData.error.message)"
)
NODE_FORMAT = 'value[separator="|"](name.basename(),state)'
ADDRESS_FORMAT = "value(networkEndpoints[0].ipAddress)"


class Cloud:
    """The state of the cloud in FOLDER/cloud.json; every change is made under a lock."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextlib.contextmanager
    def change(self) -> Iterator[dict]:
        """The state, written back at the end.

        queued: the queued resource or None; nodes: TPU VMs by name; plans: of the next creations; created,
        deleted: how often;
        silent: [node, worker] of hosts that ssh does not reach; most_nodes: greatest number of VMs that were
        there at once.
        """
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.folder / "cloud.json"
            empty = {
                "queued": None,
                "nodes": {},
                "plans": [],
                "created": 0,
                "deleted": 0,
                "silent": [],
                "most_nodes": 0,
            }
            state = json.loads(path.read_text()) if path.exists() else empty
            try:
                yield state
            finally:
                state["most_nodes"] = max(state["most_nodes"], len(state["nodes"]))
                path.write_text(json.dumps(state))

    def home(self, node: str, worker: int) -> Path:
        """The home folder of a host."""
        return self.folder / "hosts" / f"{node}-w{worker}"

    def lose(self, state: dict, name: str, becomes: str | None) -> None:
        """A TPU VM is taken away, its hosts with all their processes and disks; its entry remains in state
        `becomes`, or goes."""
        for worker in range(state["nodes"][name]["workers"]):
            home = self.home(name, worker)
            status = home / "aurora" / "run" / "status.json"
            if status.exists():
                values = json.loads(status.read_text())
                for number in (values["pid"], values["process"]):
                    with contextlib.suppress(ProcessLookupError, TypeError):
                        os.kill(number, signal.SIGKILL)
            shutil.rmtree(home, ignore_errors=True)
        if becomes is None:
            del state["nodes"][name]
        else:
            state["nodes"][name]["state"] = becomes

    def look(self, state: dict) -> None:
        """Time passes: the queued resource takes its next state."""
        queued = state["queued"]
        if queued is None:
            return
        if queued["to_come"]:
            queued["state"] = queued["to_come"].pop(0)
        if queued["state"] == "GONE":
            state["queued"] = None
        elif queued["state"] in ("PROVISIONING", "ACTIVE", "FAILED"):
            # Of a request that fails, all slices but the last were made.
            for name in queued["names"][: -1 if queued["state"] == "FAILED" else None]:
                known = state["nodes"].setdefault(name, {"state": "CREATING", "workers": queued["workers"]})
                if queued["state"] == "ACTIVE" and known["state"] == "CREATING":
                    known["state"] = "READY"
                    for worker in range(queued["workers"]):
                        self.home(name, worker).mkdir(parents=True, exist_ok=True)


def fail(message: str) -> None:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    raise SystemExit(1)


def queued_resources(cloud: Cloud, verb: str, words: list[str], flags: dict[str, str]) -> None:
    with cloud.change() as state:
        if verb == "create":
            plan = state["plans"].pop(0) if state["plans"] else {}
            if "refused" in plan:
                fail(plan["refused"])
            if state["queued"] is not None:
                fail(f"ALREADY_EXISTS: Resource 'projects/p/locations/z/queuedResources/{words[0]}' already exists")
            count = int(flags.get("--node-count", 1))
            prefix = flags.get("--node-prefix", words[0])
            names = [flags["--node-id"]] if "--node-id" in flags else [f"{prefix}-{number}" for number in range(count)]
            if taken := set(names) & set(state["nodes"]):
                fail(f"ALREADY_EXISTS: node {taken}")
            state["created"] += 1
            state["queued"] = {
                "state": "ACCEPTED",
                "to_come": plan.get("states", ["ACTIVE"]),
                "names": names,
                "workers": plan.get("workers", 2),
                "type": flags["--accelerator-type"],
                "count": count if count > 1 else "",
                "spot": "e30=" if "--spot" in flags else "",
                "reserved": "True" if "--reserved" in flags else "",
                "message": plan.get("message", ""),
                "leaves": plan.get("leaves", []),
            }
            if plan.get("unheard"):
                fail("Deadline exceeded while waiting for operation")
        elif verb == "list":
            cloud.look(state)
            queued = state["queued"]
            if queued is not None:
                assert flags["--format"] == QUEUED_FORMAT
                message = queued["message"] if queued["state"] == "FAILED" else ""
                print(
                    "|".join(
                        [
                            queued["state"],
                            queued["type"],
                            str(queued["count"]),
                            queued["spot"],
                            queued["reserved"],
                            message,
                        ]
                    )
                )
        elif verb == "delete":
            queued = state["queued"]
            if queued is None:
                fail(f"NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{words[0]}' was not found.")
            if "--force" not in flags and queued["state"] not in ("ACCEPTED", "FAILED", "SUSPENDED"):
                fail("FAILED_PRECONDITION: the queued resource has nodes")
            for name in list(state["nodes"]):
                if name in queued["names"] and name not in queued["leaves"]:
                    cloud.lose(state, name, None)
            queued["state"], queued["to_come"] = "DELETING", ["DELETING", "GONE"]
            state["deleted"] += 1
        else:
            fail(f"Invalid choice: {verb!r}")


def tpu_vm(cloud: Cloud, verb: str, words: list[str], flags: dict[str, str]) -> None:
    if verb in ("ssh", "scp"):
        return hosts(cloud, verb, words, flags)
    with cloud.change() as state:
        if verb == "list":
            assert flags["--format"] == NODE_FORMAT
            for name, node in state["nodes"].items():
                print(f"{name}|{node['state']}")
        elif verb == "describe":
            assert flags["--format"] == ADDRESS_FORMAT
            print(f"10.0.{sorted(state['nodes']).index(words[0])}.2")
        elif verb == "delete":
            cloud.lose(state, words[0], None)
        else:
            fail(f"Invalid choice: {verb!r}")
    return None


def hosts(cloud: Cloud, verb: str, words: list[str], flags: dict[str, str]) -> None:
    node, _, target = words[-1].partition(":")
    with cloud.change() as state:
        if state["nodes"].get(node, {}).get("state") != "READY":
            fail(f"TPU {node} is not in state READY")
        workers = range(state["nodes"][node]["workers"]) if flags["--worker"] == "all" else [int(flags["--worker"])]
        silent = {worker for name, worker in state["silent"] if name == node}
    running, status = [], 0
    for worker in workers:
        home = cloud.home(node, worker)
        if worker in silent:
            print(f"ssh: connect to host {node} port 22: Connection timed out", file=sys.stderr)
            status = 255
        elif verb == "scp":
            shutil.copy(words[0], home / target)
        else:
            environment = {**os.environ, "HOME": str(home)}
            running.append(
                subprocess.Popen(
                    ["bash", "-c", flags["--command"]], cwd=home, env=environment, stdin=subprocess.DEVNULL
                )
            )
    for process in running:
        status = process.wait() or status
    raise SystemExit(status)


def main(arguments: list[str]) -> None:
    cloud = Cloud(Path(os.environ["FAKE_CLOUD"]))
    with (cloud.folder / "commands.jsonl").open("a") as log:
        log.write(json.dumps(arguments) + "\n")
    words = [word for word in arguments if not word.startswith("--")]
    flags = dict((word.split("=", 1) if "=" in word else (word, "")) for word in arguments if word.startswith("--"))
    if words[0] == "alpha":
        words = words[1:]
    elif "--batch-size" in flags:
        fail("unrecognized arguments: --batch-size flag is available in one or more alternate release tracks")
    group, verb, rest = words[2], words[3], words[4:]
    {"queued-resources": queued_resources, "tpu-vm": tpu_vm}[group](cloud, verb, rest, flags)


if __name__ == "__main__":
    main(sys.argv[1:])
