"""The configuration of a training run: a tree of frozen dataclasses, every field of which is a command-line flag."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aurora_jax.errors import InputError
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.mesh import MeshConfig
from aurora_jax.storage.places import place_of
from aurora_jax.train.stages import Stage


@dataclass(frozen=True)
class DataConfig:
    """Where the text is and how it becomes batches."""

    corpus: str
    """Folder of the sources: a sample corpus, or the --data-root of `aurora data build`; not needed where the
    stores are."""
    tokenizer: Path | None = None
    """tokenizer.json, a SentencePiece .model, a folder that holds one (or vocab.json with merges.txt), or the
    word bytes; without it, the tokenizer of `initial_checkpoint`. It is that of the stores, and the run's
    checkpoints carry it."""
    allow_other_tokenizer: bool = False
    """Train although `tokenizer` is not the checkpoint's own, for an old model that gets a new vocabulary:
    the weights learn anew what its ids mean, and the run carries the tokenizer of the data. Without it such a
    pair is refused."""
    stores: str = "stores"
    """Folder of the token stores, local, gs:// or s3://; a run on one process builds those that are missing."""
    modules: tuple[str, ...] = ()
    """Python modules that register further tasks and mixtures with SeqIO."""
    skip_missing: bool = False
    """Train without the tasks that have no store, the others' rates raised in proportion."""
    batch_size: int = 16
    """Sequences a step, over all devices and micro-batches."""
    sequence_length: int = 512
    """Tokens a sequence."""
    attend_across_documents: bool = True
    """Packed documents see each other (StarCoder's own practice), or each is on its own with positions from 0, and the
    first token of the next is not asked of its end. Evaluations do as training does."""
    prefetch: int = 2
    """Batches that are made in advance."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101): matrices and embeddings decay, biases and LayerNorm
    do not."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Largest global norm of the gradient; longer ones are scaled down to it."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 a token (PaLM, arXiv 2204.02311), which keeps the logits from drifting."""
    micro_batches: int = 1
    """Parts into which a batch is cut to save memory; the gradient is that of the whole batch, and a resumed run may
    change it."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which Adam's two moments are kept between steps; bf16 saves four bytes a parameter where
    memory is short."""
    spike_sigmas: float | None = None
    """Skip an update whose loss or gradient norm lies this many standard deviations above its rolling mean (6 in the
    configs for pods); a non-finite one is always skipped."""
    most_skipped: int = 20
    """Updates skipped in a row after which the run is called diverged: it writes diagnosis.json and ends with status
    5, which supervisors do not restart."""

    def __post_init__(self) -> None:
        for name in ("micro_batches", "most_skipped"):
            if getattr(self, name) < 1:
                raise InputError(f"optimizer.{name} is {getattr(self, name)}: give at least 1.")
        if self.spike_sigmas is not None and self.spike_sigmas <= 0:
            raise InputError(f"optimizer.spike_sigmas is {self.spike_sigmas}: give a number above 0, or none.")
        if self.moments_dtype == "bfloat16" and max(self.beta1, self.beta2) > 0.99:
            raise InputError(
                f"moments_dtype bfloat16 with beta1 {self.beta1} and beta2 {self.beta2}: above 0.99 a step "
                "changes an average by less than "
                "bf16's rounding, and it would stand still. Keep the moments in float32, or lower the beta."
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """What a run is judged on, in the loop: bits per byte of held-out text, and continuations to read."""

    tasks: tuple[str, ...] | None = None
    """Tasks whose validation split the run is judged on. A run must say it: without them it does not start, and with
    none (--evaluation.tasks and nothing behind it) it trains unmeasured."""
    keep: tuple[str, ...] = ()
    """Those of `tasks` that the model could do before and is not to forget: the report tells them from what was
    learnt."""
    every: int = 100
    """Steps between quick evaluations; the whole held-out text, too, is evaluated before the first step and at the end
    of each stage."""
    quick_windows: int = 16
    """Sequences a task in a quick evaluation, evenly drawn from its held-out text, the same ones each time."""
    batch_size: int = 16
    """Sequences that are read at once."""
    prompts: tuple[tuple[str, str], ...] = ()
    """(language, text) pairs that the model goes on with before the first step and at the end of each stage; to the
    console, TensorBoard, metrics.jsonl and the report."""
    max_new_tokens: int = 48
    """Most tokens of such a continuation."""

    def __post_init__(self) -> None:
        unmeasured = [task for task in self.keep if self.tasks is not None and task not in self.tasks]
        if unmeasured:
            raise InputError(
                f"evaluation.keep names {', '.join(unmeasured)}, which the run is not judged on: give its names to "
                "evaluation.tasks too, or others to evaluation.keep (--evaluation.keep and nothing behind it for none)."
            )
        if self.prompts and self.tasks == ():
            raise InputError(
                "evaluation.prompts are gone on with where all held-out text is read, and the run is judged on none: "
                "give evaluation.tasks, or no prompts."
            )
        for name in ("every", "quick_windows", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"evaluation.{name} is {getattr(self, name)}: give at least 1.")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run, in OUTPUT/checkpoints; the end of each stage is kept in OUTPUT/stages too."""

    every: int = 200
    """Steps between checkpoints."""
    minutes: float = 15.0
    """Minutes between checkpoints at most, whatever `every` says: what a machine that vanishes can cost; 0 to go by
    steps alone."""
    grace_seconds: float = 30.0
    """Notice of a preemption, in seconds (30 for spot TPUs, by Google Cloud's documentation): if the first checkpoint
    takes longer, the run says what a preemption can then cost."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints of the multiples of so many steps are kept for good."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"checkpoint.{name} is {getattr(self, name)}: give at least 1.")
        if self.minutes < 0:
            raise InputError(f"checkpoint.minutes is {self.minutes}: give minutes, or 0 to go by steps alone.")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.every):
            raise InputError(
                f"checkpoint.keep_every is {self.keep_every}: give a multiple of checkpoint.every, {self.every}."
            )


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The same command again continues it from its newest complete checkpoint."""

    output: Path
    """The run's folder: checkpoints, stages, metrics.jsonl, TensorBoard files."""
    stages: tuple[Stage, ...]
    data: DataConfig
    model: ModelConfig | None = None
    """Architecture for random initial weights; the checkpoint's own if there is one."""
    initial_checkpoint: Path | None = None
    """Weights to start from: a converted checkpoint, or another run (its newest step). The optimizer starts fresh."""
    dropout: float = 0.0
    """Dropout rate, in place of what the checkpoint's config says."""
    seed: int = 0
    """Of initial weights, of the order of the data and of dropout."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    rollback: int = 0
    """When the run has diverged (diagnosis.json is there), go back this many of its checkpoints, the newest before the
    batches that were skipped being the first, and go on without these batches. Once a diagnosis; without one, nothing
    is rolled back."""
    stop_after: int | None = None
    """Stop, with a checkpoint, after this many steps of the run: for budgets and for tests of resuming."""
    compare_devices_every: int = 0
    """Steps between looks whether two devices, given the same rows, have the same result to the bit; one that
    miscalculates ends the run with status 6. A look reads evaluation.batch_size rows twice. 0 for none; 1,000 in the
    configs for pods."""
    watchdog_minutes: float = 15.0
    """Minutes without a finished step after which a process ends with status 75, to be started again: of several
    processes one that hangs would stop all others for ever. Compiling, evaluations and checkpoints may take four times
    as long. 0 for never."""
    log_format: Literal["auto", "lines"] = "auto"
    """A live progress bar on a terminal, or a line every few seconds."""
    profile_steps: tuple[int, int] | None = None
    """Trace these steps, first and last (numbered from 0, as in metrics.jsonl), into OUTPUT/profile, for
    XProf. The first step that a process does compiles: choose later ones."""
    wandb_project: str | None = None
    """Send the metrics to this project at Weights & Biases too (`pip install wandb`)."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("The stage table is empty: a run needs at least one stage.")
        if self.data.batch_size % self.optimizer.micro_batches:
            raise InputError(
                f"batch_size {self.data.batch_size} is not divisible by micro_batches {self.optimizer.micro_batches}."
            )
        if (self.model is None) == (self.initial_checkpoint is None):
            raise InputError(
                "Give either `model` (random initial weights) or `initial_checkpoint` (converted or trained "
                "weights), not both."
            )
        object.__setattr__(self, "output", place_of(self.output))
        if self.initial_checkpoint is not None:
            object.__setattr__(self, "initial_checkpoint", place_of(self.initial_checkpoint))
        if self.profile_steps is not None and not 0 <= self.profile_steps[0] <= self.profile_steps[1] < self.steps:
            raise InputError(
                f"profile_steps {self.profile_steps}: give the first and the last of the run's steps 0 to "
                f"{self.steps - 1}."
            )
        if self.watchdog_minutes < 0:
            raise InputError(f"watchdog_minutes is {self.watchdog_minutes}: give minutes, or 0 for none.")
        if self.rollback < 0:
            raise InputError(f"rollback is {self.rollback}: give how many checkpoints to go back, 1 or more.")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise InputError(f"Stage names must differ: {', '.join(names)}.")

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def ends(self) -> dict[int, str]:
        """The steps after which a stage is done, and its name."""
        return dict(
            zip(
                itertools.accumulate(stage.steps for stage in self.stages),
                (stage.name for stage in self.stages),
                strict=True,
            )
        )
