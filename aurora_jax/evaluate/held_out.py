"""A checkpoint's bits per byte of held-out text."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from aurora_jax.checkpoints import format as checkpoint_format
from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.data.text.tokenizer import tokenizer_of
from aurora_jax.data.text.tokenizer_files import require_tokenizer_of_stores
from aurora_jax.errors import InputError
from aurora_jax.evaluate.bits_per_byte import Evaluator
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.likelihood import Likelihood
from aurora_jax.model.mesh import MeshConfig, make_mesh
from aurora_jax.model.sharding import parameter_shardings

LONGEST = 2_048
"""Tokens of a window for a checkpoint that no run has written, if its model has learnt as many positions."""

FP32 = ComputeConfig("float32", "float32", unroll_layers=True)


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    corpus: str,
    stores: str,
    tasks: Sequence[str] = (),
    modules: Sequence[str] = (),
    batch_size: int = 16,
    sequence_length: int | None = None,
    attend_across_documents: bool | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
    compute: ComputeConfig = FP32,
) -> dict[str, Any]:
    """Scores of the held-out text of every task, all of it.

    Args:
        checkpoint: a converted checkpoint, a stage of a run, or a run (its newest step).
        corpus: folder of the sources.
        stores: folder of the token stores; those that are missing are built.
        tasks: their split `validation` is read; without them what the run is judged on that wrote the checkpoint.
        modules: Python modules that register further tasks with SeqIO.
        batch_size: windows that are read at once.
        sequence_length: tokens a window; that of the run which wrote the checkpoint, or the model's longest sequence
            up to LONGEST.
        attend_across_documents: whether documents of a window see each other; as in that run, or yes.
        mesh: of all devices.

    Returns:
        A row as a run writes it to metrics.jsonl (`evaluations`), with the checkpoint's path.

    Raises:
        InputError: the checkpoint or the corpus is not one, the model cannot read windows of that length, or the
            mesh cannot divide them.
    """
    metadata = checkpoint_format.read_metadata(checkpoint)
    model = metadata.config
    run = checkpoint_format.read_run(checkpoint) or {}
    length = sequence_length or run.get("sequence_length") or min(model.max_positions, LONGEST)
    across = attend_across_documents
    if across is None:
        across = run.get("attend_across_documents", True)
    likelihood = Likelihood(model, compute, make_mesh(mesh), isolate_documents=not across)
    likelihood.check(**{"--batch-size": batch_size, "--sequence-length": length})

    tasks = tuple(tasks) or tuple(run.get("held_out", ()))
    if not tasks:
        raise InputError(
            f"{checkpoint} does not say what it is judged on: name tasks that have a validation split, such as --tasks "
            "sample_en sample_code of a sample corpus, or those of your --modules."
        )

    # SeqIO brings TensorFlow, which takes seconds to import: after what may be refused at once.
    from aurora_jax.data.batches.store import store_directory
    from aurora_jax.data.build.opening import open_stores
    from aurora_jax.data.registry.tasks import register
    from aurora_jax.data.registry.vocabulary import Vocabulary

    tokenizer = tokenizer_of(checkpoint_format.read_files(checkpoint), checkpoint)
    registry = register(corpus, Vocabulary(tokenizer), modules)
    directories = {task: store_directory(stores, task, "validation") for task in tasks}
    require_tokenizer_of_stores(tokenizer.sha256, checkpoint, directories)
    held_out = open_stores([registry.recipe(task, "validation") for task in directories], stores)
    evaluator = Evaluator(likelihood, held_out, tokenizer, batch_size=batch_size, sequence_length=length)
    shardings = parameter_shardings(model, likelihood.mesh)
    scores = evaluator(restore_parameters(checkpoint, dtype=jnp.float32, shardings=shardings))
    return {
        "checkpoint": str(checkpoint_format.resolve(checkpoint)),
        "step": metadata.step,
        "stage": metadata.stage,
        "complete": True,
        "settings": evaluator.settings().to_json(),
        "evaluation": {task: asdict(score) for task, score in scores.items()},
    }
