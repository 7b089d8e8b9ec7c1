"""The stage table: what is trained on for how long, and the learning rate of every step."""

import math
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
    """After the warm-up: a cosine from the peak to `final`, or the peak held and then a straight line down to
    `final` (WSD; Hu et al. 2024, arXiv 2404.06395), which need not know the horizon in advance."""
    final: float = 0.0
    decay_steps: int | None = None
    """Steps of the decay. Cosine: all that follow the warm-up of this stage unless given; if it reaches
    beyond the stage, a following stage without a schedule of its own rides on. Warm-up-stable-decay: the last
    tenth of the stage unless given."""

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf or not 0 <= self.final < math.inf:
            raise InputError(
                f"A learning rate of peak {self.peak} and final {self.final}: the peak must be above 0, the "
                "final rate 0 or more."
            )
        if self.warmup_steps < 0 or (self.decay_steps is not None and self.decay_steps < 1):
            raise InputError(
                f"A learning rate with {self.warmup_steps} warm-up and {self.decay_steps} decay steps: give 0 "
                "or more, and 1 or more."
            )

    def phases(self, steps: int) -> tuple[int, int]:
        """Steps of the stable phase (0 for a cosine) and of the decay, in a stage of `steps` steps; what follows runs
        at `final`.

        Raises:
            InputError: warm-up and decay do not fit.
        """
        if self.shape == "cosine":
            decay_steps = self.decay_steps or steps - self.warmup_steps
            stable_steps = 0
        else:
            decay_steps = self.decay_steps or max(1, steps // 10)
            stable_steps = steps - self.warmup_steps - decay_steps
        if decay_steps < 1 or stable_steps < 0 or self.warmup_steps >= steps:
            raise InputError(
                f"A stage of {steps} steps has no room for {self.warmup_steps} warm-up and {self.decay_steps} "
                "decay steps: make it longer "
                "or them shorter."
            )
        return stable_steps, decay_steps

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate at each step of a stage of `steps` steps. Raises InputError if warm-up and decay do not fit."""
        stable_steps, decay_steps = self.phases(steps)
        decay = (
            optax.cosine_decay_schedule(self.peak, decay_steps, alpha=self.final / self.peak)
            if self.shape == "cosine"
            else optax.linear_schedule(self.peak, self.final, decay_steps)
        )
        # The first step already has a rate above zero: step s of the warm-up runs at (s + 1) / warmup_steps
        # of the peak.
        warmup = optax.linear_schedule(self.peak / max(1, self.warmup_steps), self.peak, max(1, self.warmup_steps - 1))
        return optax.join_schedules(
            [warmup, optax.constant_schedule(self.peak), decay], [self.warmup_steps, self.warmup_steps + stable_steps]
        )


@dataclass(frozen=True)
class Stage:
    """One row of the stage table."""

    name: str
    mixture: str
    """Name of a registered SeqIO mixture or task, or tasks with their rates: sample_fi=0.5,sample_en=0.5."""
    steps: int
    learning_rate: LearningRate | None = None
    """None: the schedule of the stage before goes on, as Aurora-M's second stage did."""


def learning_rate_schedule(stages: Sequence[Stage]) -> optax.Schedule:
    """The learning rate as a function of the run's step.

    Raises:
        InputError: the first stage has no schedule, one does not fit its stage, or steps would be trained at a rate of
            0, which changes nothing and costs as much as any other.
    """
    schedules: list[optax.Schedule] = []
    boundaries: list[int] = []
    begun_at = first_step = 0
    owner: Stage | None = None
    for stage in stages:
        if stage.learning_rate is not None:
            owner, begun_at = stage, first_step
        if owner is None or owner.learning_rate is None:
            raise InputError(f"Stage {stage.name!r} is the first and has no learning rate to go on with: give it one.")
        current = owner.learning_rate.schedule(owner.steps)
        schedules.append(lambda step, current=current, offset=first_step - begun_at: current(step + offset))
        first_step += stage.steps
        boundaries.append(first_step)
        _require_rates(stage, owner, steps=first_step - begun_at)
    return optax.join_schedules(schedules, boundaries[:-1])


def _require_rates(stage: Stage, owner: Stage, steps: int) -> None:
    """Raises InputError if, of the first `steps` steps of the schedule of `owner`, the last ones, in `stage`, are at a
    rate of 0.

    It goes by the phases, not by values: the last steps before a long cosine's end round to 0 in fp32, and are meant
    so.
    """
    rate = owner.learning_rate
    assert rate is not None
    stable_steps, decay_steps = rate.phases(owner.steps)
    at_zero = min(steps - rate.warmup_steps - stable_steps - decay_steps, stage.steps)
    if rate.final > 0 or at_zero <= 0:
        return
    missing = (
        f"{at_zero:,} of the {stage.steps:,} steps of stage {stage.name!r} would be trained at a learning "
        "rate of 0: the schedule of "
    )
    longer = f"LearningRate(..., decay_steps={steps - rate.warmup_steps})"
    if stage is owner:
        raise InputError(f"{missing}the stage ends before its steps do. Write {longer}, or final=RATE above 0.")
    stretched = f"{longer} in stage {owner.name!r}, " if rate.shape == "cosine" else ""
    raise InputError(
        f"{missing}stage {owner.name!r}, on which it rides, ends before. Write {stretched}final=RATE above 0 "
        f"in stage {owner.name!r}, "
        f"or give stage {stage.name!r} a learning_rate of its own."
    )
