"""The options of the command line, as read."""

import re
from dataclasses import dataclass
from pathlib import Path

from aurora_jax.launch.commands import Stop

ROOT = Path(__file__).resolve().parents[2]
"""The repository, or the copy of it on a host."""


@dataclass(frozen=True)
class Options:
    """What `command_line` read; the help texts say what each is."""

    verb: str
    train: tuple[str, ...]
    """CONFIG.py and all that follows it; the command of `ssh`."""
    name: str
    location: tuple[str, ...]
    """--zone and --project, as gcloud takes them."""
    zone: str
    hosts: tuple[str, ...]
    ssh_options: tuple[str, ...]
    remote_dir: str
    dry_run: bool
    poll: float
    accelerator_type: str
    num_slices: int
    provisioning: str
    runtime_version: str
    create_flags: tuple[str, ...]
    no_wait: bool
    commit: str
    bucket: str
    extras: str
    python: str
    venv: str
    env: tuple[str, ...]
    heartbeat: str
    again: bool
    coordinator: str
    port: str
    down: bool
    fruitless_starts: int
    unreachable: float
    worker: str
    slice: str
    lines: str
    follow: bool
    yes: bool

    @property
    def request(self) -> str:
        """Such as `2 x v5p-128 (spot)`."""
        return f"{self.num_slices} x {self.accelerator_type} ({self.provisioning})"

    @property
    def down_command(self) -> str:
        """What deletes all that costs money."""
        return " ".join(["launch_tpu.sh down --name", self.name, *self.location])


def require(given: str, pattern: str, what: str) -> None:
    """Raises Stop with `what` unless the pattern matches the whole value."""
    if not re.fullmatch(pattern, given):
        raise Stop(what)


RUNTIME_VERSIONS = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""Google Cloud's page "TPU software versions", the rows for JAX."""


def runtime_version(options: Options) -> str:
    """The given one, or that of the kind of chip. Raises Stop where the accelerator's name is not one of the
    cloud's."""
    kind, _, size = options.accelerator_type.partition("-")
    where = f"--accelerator-type {options.accelerator_type}"
    if not options.accelerator_type:
        raise Stop(f"{options.verb}: give --accelerator-type, such as v5p-128")
    if kind == "v5e" and size:
        raise Stop(f"{where}: the cloud calls v5e v5litepod: v5litepod-{size}")
    known = RUNTIME_VERSIONS.get(kind) if size else None
    if known is None and ":" in options.accelerator_type:
        raise Stop(
            f"{where} is a topology of `aurora plan`; the cloud counts chips (v5litepod-256, v6e-256) or two "
            "cores a chip (v4-256, v5p-128)"
        )
    version = options.runtime_version or known
    if not version:
        raise Stop(f"{where}: give --runtime-version too; it is known for v4, v5litepod, v5p and v6e")
    return version
