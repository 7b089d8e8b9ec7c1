"""Checkpoints that a test has changed on purpose: held to what they hold now."""

import json
from pathlib import Path

from aurora_jax.storage.records import SHA256, json_sha256


def resealed(values: dict) -> dict:
    """Metadata with the digest of their present entries."""
    rest = {name: value for name, value in values.items() if name != SHA256}
    return {**rest, SHA256: json_sha256(rest)}


def reseal(checkpoint: Path) -> None:
    """Makes the metadata agree with the texts that lie there."""
    file = checkpoint / "metadata" / "metadata"
    values = json.loads(file.read_text())
    for item in values["contents"]["sha256"]:
        values["contents"]["sha256"][item] = json_sha256(json.loads((checkpoint / item / "metadata").read_text()))
    file.write_text(json.dumps(resealed(values)))


def as_format_1(checkpoint: Path) -> None:
    """Makes it one of the versions until 2026-11-25, which proved nothing."""
    file = checkpoint / "metadata" / "metadata"
    values = json.loads(file.read_text())
    for name in (SHA256, "contents", "made_with"):
        del values[name]
    file.write_text(json.dumps({**values, "format_version": 1}))
