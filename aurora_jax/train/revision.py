"""Which code a run has, for its checkpoints."""

from pathlib import Path

COMMIT = Path(__file__).resolve().parents[2] / "COMMIT"
"""`launch_tpu.sh setup` writes it beside the code that it puts on a host."""


def revision_fact() -> dict[str, str]:
    """{"revision": commit}, or nothing where the launcher did not put the code here. A note in the run's
    facts: none that is compared."""
    return {"revision": COMMIT.read_text().strip()} if COMMIT.is_file() else {}
