"""`aurora eval`: bits per byte of a checkpoint on held-out text."""

from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from aurora_jax.data.tokenizer import tokenizer_of
from aurora_jax.data.tokenizer_files import require_tokenizer_of_stores
from aurora_jax.evaluate.bits_per_byte import Evaluator
from aurora_jax.model import checkpoint
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.decoder import structure_of


@dataclass(frozen=True)
class EvalCommand:
    """Prints loss and bits per byte of the held-out text of every language of a sample corpus."""

    checkpoint: tyro.conf.Positional[Path]
    """A converted checkpoint, a stage of a run (RUN/stages/NAME), or a run (its newest step)."""
    corpus: str = "corpus"
    """Corpus folder, as `aurora data sample` writes it."""
    stores: str = "stores"
    """Folder of the token stores; those that are missing are built."""
    modules: tuple[str, ...] = ()
    """Python modules that register further tasks with SeqIO."""
    tasks: tuple[str, ...] = ("sample_en", "sample_code", "sample_fi", "sample_hi", "sample_ja", "sample_vi")
    batch_size: int = 16
    sequence_length: int | None = None
    """Tokens a sequence; the model's longest, at most 2,048, without it."""
    compute: ComputeConfig = field(default_factory=lambda: ComputeConfig("float32", "float32", unroll_layers=True))

    def run(self) -> None:
        """Raises InputError if the checkpoint or the corpus is not one."""
        model = checkpoint.read_metadata(self.checkpoint).config

        # SeqIO brings TensorFlow, which takes seconds to import: after what may be refused at once.
        from aurora_jax.data.opening import open_stores, store_directory
        from aurora_jax.data.tasks import register
        from aurora_jax.data.vocabulary import Vocabulary

        tokenizer = tokenizer_of(checkpoint.read_files(self.checkpoint), self.checkpoint)
        register(self.corpus, Vocabulary(tokenizer), self.modules)
        directories = {task: store_directory(self.stores, task, "validation") for task in self.tasks}
        require_tokenizer_of_stores(tokenizer.sha256, self.checkpoint, directories)
        stores = open_stores(self.tasks, "validation", self.stores)
        evaluator = Evaluator(
            structure_of(model, self.compute),
            self.compute,
            stores,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length or min(model.max_positions, 2_048),
        )
        scores = evaluator(checkpoint.restore_parameters(self.checkpoint, dtype=jnp.float32))

        table = Table("task", "bits per byte", "nats per token", "tokens", title=str(self.checkpoint))
        for task, score in scores.items():
            table.add_row(task, f"{score.bits_per_byte:.4f}", f"{score.loss:.4f}", f"{score.tokens:,}")
        Console().print(table)
