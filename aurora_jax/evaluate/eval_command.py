"""`aurora eval`: bits per byte of a checkpoint on held-out text."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.data.text.tokenizer import tokenizer_of
from aurora_jax.data.text.tokenizer_files import require_tokenizer_of_stores
from aurora_jax.errors import InputError
from aurora_jax.evaluate.bits_per_byte import Evaluator
from aurora_jax.evaluate.evaluations import described
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.decoder import structure_of

LONGEST = 2_048
"""Tokens of a window for a checkpoint that no run has written, if its model has learnt as many positions."""


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
    compute: ComputeConfig = field(default_factory=lambda: ComputeConfig("float32", "float32", unroll_layers=True))
    json: Path | None = None
    """Write the scores and how they were measured there too."""

    def run(self) -> None:
        """Raises InputError if the checkpoint or the corpus is not one, or the model cannot read windows of that
        length."""
        metadata = checkpoint.read_metadata(self.checkpoint)
        model = metadata.config
        run = checkpoint.read_run(self.checkpoint) or {}
        length = self.sequence_length or run.get("sequence_length") or min(model.max_positions, LONGEST)
        across = self.attend_across_documents
        if across is None:
            across = run.get("attend_across_documents", True)
        if not 0 < length <= model.longest_sequence:
            raise InputError(
                f"windows of {length} tokens: the model reads 1 to {model.longest_sequence}; give --sequence-length."
            )

        tasks = self.tasks or tuple(run.get("held_out", ()))
        if not tasks:
            raise InputError(
                f"{self.checkpoint} does not say what it is judged on: name tasks that have a validation split, such "
                "as --tasks sample_en sample_code of a sample corpus, or those of your --modules."
            )

        # SeqIO brings TensorFlow, which takes seconds to import: after what may be refused at once.
        from aurora_jax.data.batches.store import store_directory
        from aurora_jax.data.build.opening import open_stores
        from aurora_jax.data.registry.tasks import register
        from aurora_jax.data.registry.vocabulary import Vocabulary

        tokenizer = tokenizer_of(checkpoint.read_files(self.checkpoint), self.checkpoint)
        register(self.corpus, Vocabulary(tokenizer), self.modules)
        directories = {task: store_directory(self.stores, task, "validation") for task in tasks}
        require_tokenizer_of_stores(tokenizer.sha256, self.checkpoint, directories)
        stores = open_stores(tasks, "validation", self.stores)
        evaluator = Evaluator(
            structure_of(model, self.compute),
            self.compute,
            stores,
            tokenizer,
            batch_size=self.batch_size,
            sequence_length=length,
            attend_across_documents=across,
        )
        scores = evaluator(checkpoint.restore_parameters(self.checkpoint, dtype=jnp.float32))

        row = {
            "checkpoint": str(checkpoint.resolve(self.checkpoint)),
            "step": metadata.step,
            "stage": metadata.stage,
            "complete": True,
            "settings": evaluator.settings().to_json(),
            "evaluation": {task: asdict(score) for task, score in scores.items()},
        }
        table = Table(
            "task", "bits per byte", "nats per token", "tokens", "bytes", "windows", title=str(self.checkpoint)
        )
        for task, score in scores.items():
            counts = (f"{score.tokens:,}", f"{score.bytes:,.0f}", f"{score.windows:,}")
            table.add_row(task, f"{score.bits_per_byte:.4f}", f"{score.loss:.4f}", *counts)
        console = Console()
        console.print(table)
        console.print(described(row), highlight=False)
        ours = {"sequence_length": length, "attend_across_documents": across}
        theirs = {name: run[name] for name in ours if name in run}
        if not theirs:
            console.print(
                "The checkpoint does not say how a run has read text: length and masks are the default's or yours."
            )
        elif theirs != ours:
            console.print(f"These are not comparable with the run's own figures: it has {theirs}.", highlight=False)
        for task, store in stores.items():
            if run.get("held_out", {}).get(task, {}).get("sources", store.info.sources) != store.info.sources:
                console.print(f"{task}: this is other text than the run's own figures are of.", highlight=False)
        if self.json is not None:
            self.json.write_text(json.dumps(row, indent=1) + "\n")
