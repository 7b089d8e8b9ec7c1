"""The guard of a run: which updates are made, decided inside the compiled step, from the loss and the gradient's norm.

Not-a-number and infinity are always kept out. A spike is a loss or a norm that lies more than `spike_sigmas` standard
deviations above its rolling mean, as in OLMo-core's SkipStepOptimizer (OLMo 2, arXiv 2501.00656, section 3.1.3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

DECAY = 0.99
"""Of the rolling means: half their weight lies on the last 70 accepted updates."""
WARMUP = 50
"""Accepted updates before the means are trusted to call anything a spike."""
LEAST_SIGMA = 0.01
"""Of the mean: a run that is smoother than this is not held to it."""


class Statistics(NamedTuple):
    """Rolling means and variances over accepted updates since the stage began; fp32 scalars, and int32 counts."""

    updates: jax.Array
    loss_mean: jax.Array
    loss_variance: jax.Array
    norm_mean: jax.Array
    norm_variance: jax.Array
    skipped: jax.Array
    """Updates in a row until now, int32: over starts too."""


def no_statistics() -> Statistics:
    """Of no update yet."""
    none, (loss_mean, loss_variance, norm_mean, norm_variance) = jnp.zeros((), jnp.int32), jnp.zeros(4)
    return Statistics(none, loss_mean, loss_variance, norm_mean, norm_variance, skipped=jnp.zeros_like(none))


def is_accepted(statistics: Statistics, loss: jax.Array, norm: jax.Array, spike_sigmas: float | None) -> jax.Array:
    """Whether the update should be made; a boolean scalar."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if spike_sigmas is None:
        return finite

    def spikes(value: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
        sigma = jnp.maximum(jnp.sqrt(variance), LEAST_SIGMA * jnp.abs(mean))
        return value > mean + spike_sigmas * sigma

    spike = spikes(loss, statistics.loss_mean, statistics.loss_variance)
    spike |= spikes(norm, statistics.norm_mean, statistics.norm_variance)
    return finite & ((statistics.updates < WARMUP) | ~spike)


def updated(statistics: Statistics, loss: jax.Array, norm: jax.Array) -> Statistics:
    """The statistics after an accepted update (exponentially weighted; T. Finch, "Incremental calculation of weighted
    mean and variance", 2009, equations 124 and 143)."""
    first = statistics.updates == 0

    def rolled(value: jax.Array, mean: jax.Array, variance: jax.Array) -> tuple[jax.Array, jax.Array]:
        step = (1 - DECAY) * (value - mean)
        return jnp.where(first, value, mean + step), jnp.where(first, 0.0, DECAY * (variance + (value - mean) * step))

    return Statistics(
        statistics.updates + 1,
        *rolled(loss, statistics.loss_mean, statistics.loss_variance),
        *rolled(norm, statistics.norm_mean, statistics.norm_variance),
        skipped=jnp.zeros((), jnp.int32),
    )
