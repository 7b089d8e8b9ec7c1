"""`aurora eval`: bits per byte of a checkpoint on held-out text."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from aurora_jax.checkpoints.format import read_run
from aurora_jax.evaluate.evaluations import described
from aurora_jax.evaluate.held_out import FP32, evaluate_checkpoint
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.mesh import MeshConfig


@dataclass(frozen=True)
class EvalCommand:
    """Prints loss and bits per byte of held-out text, task by task: of what the run that wrote the checkpoint is judged
    on, or of --tasks.

    The text is read as the run that wrote the checkpoint reads it: windows of its length, documents that attend to each
    other or do not. A checkpoint that was not written by a run is read in windows of its longest sequence, at most
    2,048 tokens, across documents.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A converted checkpoint, a stage of a run (RUN/stages/NAME), or a run (its newest step)."""
    corpus: str = "corpus"
    """Folder of the sources, as for `aurora data build`; not needed where the stores are."""
    stores: str = "stores"
    """Folder of the token stores; those that are missing are built."""
    modules: tuple[str, ...] = ()
    """Python modules that register further tasks with SeqIO."""
    tasks: tuple[str, ...] = ()
    """Tasks whose validation split is read, in place of those that the run is judged on."""
    batch_size: int = 16
    """Sequences that are read at once."""
    sequence_length: int | None = None
    """Tokens a window, in place of the run's."""
    attend_across_documents: bool | None = None
    """Whether documents of a window see each other, in place of what the run does."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """All devices, along fsdp unless told otherwise."""
    compute: ComputeConfig = FP32
    json: Path | None = None
    """Write the scores and how they were measured there too."""

    def run(self) -> None:
        """Raises InputError as `evaluate_checkpoint` does."""
        row = evaluate_checkpoint(
            self.checkpoint,
            corpus=self.corpus,
            stores=self.stores,
            tasks=self.tasks,
            modules=self.modules,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            attend_across_documents=self.attend_across_documents,
            mesh=self.mesh,
            compute=self.compute,
        )
        table = Table(
            "task", "bits per byte", "nats per token", "tokens", "bytes", "windows", title=str(self.checkpoint)
        )
        for task, score in row["evaluation"].items():
            counts = (f"{score['tokens']:,}", f"{score['bytes']:,.0f}", f"{score['windows']:,}")
            table.add_row(task, f"{score['bits_per_byte']:.4f}", f"{score['loss']:.4f}", *counts)
        console = Console()
        console.print(table)
        console.print(described(row), highlight=False)
        run = read_run(self.checkpoint) or {}
        ours = {name: row["settings"][name] for name in ("sequence_length", "attend_across_documents")}
        theirs = {name: run[name] for name in ours if name in run}
        if not theirs:
            console.print(
                "The checkpoint does not say how a run has read text: length and masks are the default's or yours."
            )
        elif theirs != ours:
            console.print(f"These are not comparable with the run's own figures: it has {theirs}.", highlight=False)
        for task, text in row["settings"]["texts"].items():
            if not run.get("held_out", {}).get(task, {}).get("sources", text).startswith(text):
                console.print(f"{task}: this is other text than the run's own figures are of.", highlight=False)
        if self.json is not None:
            self.json.write_text(json.dumps(row, indent=1) + "\n")
