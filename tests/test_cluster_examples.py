"""The examples for SkyPilot and GKE, each through the parser of the tool that it is for.

SkyPilot and XPK bring hundreds of megabytes and are not among our pins. An environment with them runs what is
skipped otherwise: `pip install skypilot[gcp]==0.14.1 xpk==1.16.0 kubernetes-validate==1.37.0`, and
AURORA_CLUSTER_TOOLS=its python.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
JOBSET = ROOT / "examples" / "jobset.yaml"
TOOLS = os.environ.get("AURORA_CLUSTER_TOOLS", sys.executable)


def ask(package: str, program: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs a program where the package is installed; skips the test where it is not."""
    if subprocess.run(
        [TOOLS, "-c", f"import importlib.util as u, sys; sys.exit(u.find_spec('{package}') is None)"]
    ).returncode:
        pytest.skip(f"{package} is not installed (see this file's head)")
    environment = {**os.environ, "HOME": str(folder)}
    return subprocess.run([TOOLS, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)


def train_commands() -> dict[str, list[str]]:
    """What each example runs: the words after `aurora`."""
    container = yaml.safe_load(JOBSET.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    task = yaml.safe_load((ROOT / "examples" / "skypilot.yaml").read_text())
    run = task["run"].replace("\\\n", " ").replace("$CONFIG", task["envs"]["CONFIG"]).splitlines()[-1]
    xpk = next(word for word in xpk_words() if word.startswith("--command="))
    return {
        "jobset": [*container["command"], *container["args"]][1:],
        "skypilot": shlex.split(run)[1:],
        "xpk": shlex.split(xpk.split("&& aurora ", 1)[1]),
    }


def xpk_words() -> list[str]:
    line = next(line for line in JOBSET.read_text().splitlines() if line.startswith("#   xpk workload"))
    return shlex.split(line.lstrip("# "))


def test_jobset_is_one():
    """By the models that are generated from JobSet's and Kubernetes' own API: what they do not know does not
    come back."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = yaml.safe_load(JOBSET.read_text())
    assert models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    misspelt = yaml.safe_load(JOBSET.read_text().replace("completionMode", "completionsMode"))
    assert models.JobsetV1alpha2JobSet.from_dict(misspelt).to_dict() != misspelt


def test_jobset_asks_for_the_chips_of_its_config():
    job = yaml.safe_load(JOBSET.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips = job["parallelism"] * int(pod["containers"][0]["resources"]["limits"]["google.com/tpu"])
    x, y, z = (int(size) for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    from configs.starcoderplus_v5p_128 import config

    mesh = config().mesh
    assert chips == x * y * z == mesh.fsdp * mesh.fsdp_inner * mesh.data * mesh.sequence * mesh.tensor
    assert job["completions"] == job["parallelism"]


@pytest.mark.parametrize("name", ["jobset", "skypilot", "xpk"])
def test_our_own_command_line_takes_the_command(name):
    import tyro

    from aurora_jax.cli import load_config
    from aurora_jax.train.config import TrainConfig

    verb, config, *words = train_commands()[name]
    assert verb == "train"
    found = tyro.cli(
        TrainConfig, default=load_config(ROOT / config), args=[word.replace("$BUCKET", "b") for word in words]
    )
    assert found.output == Path("/bucket/runs/cap")
    assert found.data.stores.startswith("gs://")


def test_kubernetes_takes_the_jobs(tmp_path):
    program = f"""
import json, kubernetes_validate, yaml
for replicated in yaml.safe_load(open({str(JOBSET)!r}))["spec"]["replicatedJobs"]:
    job = {{"apiVersion": "batch/v1", "kind": "Job", "metadata": {{"name": replicated["name"]}}, "spec": replicated["template"]["spec"]}}
    kubernetes_validate.validate(job, "1.34", strict=True)
"""
    done = ask("kubernetes_validate", program, tmp_path)
    assert done.returncode == 0, done.stderr


def test_skypilot_takes_the_task(tmp_path):
    program = """
import json, sky
task = sky.Task.from_yaml("examples/skypilot.yaml")
(resources,) = task.resources
print(json.dumps([str(resources.cloud), resources.accelerators, resources.use_spot, resources.accelerator_args, list(task.storage_mounts)]))
"""
    done = ask("sky", program, tmp_path)
    assert done.returncode == 0, done.stderr
    expected = ["GCP", {"tpu-v5p-128": 1}, True, {"runtime_version": "v2-alpha-tpuv5"}, ["/bucket"]]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_xpk_takes_the_command(tmp_path):
    program = f"""
import argparse
import xpk.main
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser()
set_parser(parser)
arguments = parser.parse_args({xpk_words()[1:]!r})
print(arguments.tpu_type, arguments.num_slices, arguments.max_restarts, arguments.workload)
"""
    done = ask("xpk", program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "v5p-128 1 1000 aurora-cap"
