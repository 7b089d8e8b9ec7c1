"""The stage table: what is trained on for how long, and the learning rate of every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import optax

from aurora_jax.errors import InputError


@dataclass(frozen=True)
class LearningRate:
    """A schedule that begins at its stage's first step with a linear (re-)warm-up from 0."""

    peak: float
    warmup_steps: int = 0
    shape: Literal["cosine", "warmup_stable_decay"] = "cosine"
    """After the warm-up: a cosine from the peak to `final`, or the peak held and then a straight line down to `final` (WSD; Hu et al. 2024,
    arXiv 2404.06395), which need not know the horizon in advance."""
    final: float = 0.0
    decay_steps: int | None = None
    """Steps of the decay. Cosine: all that follow the warm-up of this stage unless given; if it reaches beyond the stage, a following stage
    without a schedule of its own rides on. Warm-up-stable-decay: the last tenth of the stage unless given."""

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate at each step of a stage of `steps` steps. Raises InputError if warm-up and decay do not fit."""
        if self.shape == "cosine":
            decay_steps = self.decay_steps or steps - self.warmup_steps
            stable_steps = 0
        else:
            decay_steps = self.decay_steps or max(1, steps // 10)
            stable_steps = steps - self.warmup_steps - decay_steps
        if decay_steps < 1 or stable_steps < 0 or self.warmup_steps >= steps:
            raise InputError(
                f"A stage of {steps} steps has no room for {self.warmup_steps} warm-up and {self.decay_steps} decay steps: make it longer "
                "or them shorter."
            )
        decay = (
            optax.cosine_decay_schedule(self.peak, decay_steps, alpha=self.final / self.peak)
            if self.shape == "cosine"
            else optax.linear_schedule(self.peak, self.final, decay_steps)
        )
        # The first step already has a rate above zero: step s of the warm-up runs at (s + 1) / warmup_steps of the peak.
        warmup = optax.linear_schedule(self.peak / max(1, self.warmup_steps), self.peak, max(1, self.warmup_steps - 1))
        return optax.join_schedules(
            [warmup, optax.constant_schedule(self.peak), decay], [self.warmup_steps, self.warmup_steps + stable_steps]
        )


@dataclass(frozen=True)
class Stage:
    """One row of the stage table."""

    name: str
    mixture: str
    """Name of a registered SeqIO mixture or task."""
    steps: int
    learning_rate: LearningRate | None = None
    """None: the schedule of the stage before goes on, as Aurora-M's second stage did."""


def learning_rate_schedule(stages: Sequence[Stage]) -> optax.Schedule:
    """The learning rate as a function of the run's step.

    Raises:
        InputError: the first stage has no schedule, or one does not fit its stage.
    """
    schedules: list[optax.Schedule] = []
    boundaries: list[int] = []
    begun_at = first_step = 0
    current: optax.Schedule | None = None
    for stage in stages:
        if stage.learning_rate is not None:
            current, begun_at = stage.learning_rate.schedule(stage.steps), first_step
        if current is None:
            raise InputError(f"Stage {stage.name!r} is the first and has no learning rate to go on with: give it one.")
        schedules.append(lambda step, current=current, offset=first_step - begun_at: current(step + offset))
        first_step += stage.steps
        boundaries.append(first_step)
    return optax.join_schedules(schedules, boundaries[:-1])
