"""Which code made a checkpoint."""

import importlib.metadata
from pathlib import Path

COMMIT = Path(__file__).resolve().parents[2] / "COMMIT"
"""`launch_tpu.sh setup` writes it beside the code that it puts on a host."""

PACKAGES = ("jax", "jaxlib", "libtpu", "orbax-checkpoint")


def revision_fact() -> dict[str, str]:
    """{"revision": commit}, or nothing where the launcher did not put the code here. A note in the run's
    facts: none that is compared."""
    return {"revision": COMMIT.read_text().strip()} if COMMIT.is_file() else {}


def made_with() -> dict[str, str]:
    """The revision of the code, and the versions of what computes and writes; of what is installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**revision_fact(), **versions}
