"""How the next token is chosen from a model's scores.

B batch, V vocabulary, W candidates that are left, the best first.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from aurora_jax.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice, applied in the order in which `transformers` applies them: penalty,
    temperature, top-k, top-p."""

    temperature: float = 0.0
    """Scores are divided by it before the softmax; 0 always takes the best token (greedy)."""
    top_k: int = 0
    """Only the k best tokens can be drawn; 0 for all."""
    top_p: float = 1.0
    """Only the smallest set of best tokens whose probabilities add up to at least this can be drawn (Holtzman
    et al. 2020, arXiv 1904.09751)."""
    repetition_penalty: float = 1.0
    """Scores of tokens that have occurred, prompt included, are divided by it, negative ones multiplied
    (Keskar et al. 2019, arXiv 1909.05858); 1 for none."""

    def __post_init__(self) -> None:
        # Beyond these, fp32 scores overflow.
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise InputError(f"temperature is {self.temperature}: it must be 0 (greedy), or from 1e-6 to 1e6.")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}: it must be 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: it must be above 0 and at most 1.")
        if not 1e-6 <= self.repetition_penalty <= 1e6:
            raise InputError(
                f"repetition_penalty is {self.repetition_penalty}: it must be from 1e-6 to 1e6; 1 for none."
            )


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array | None, seeds_B: jax.Array, place: jax.Array, sampling: Sampling
) -> jax.Array:
    """The next token of each row, int32 [B].

    A row's draws depend on its own seed and on the place alone: neither on other rows nor on the size of the batch.

    Args:
        seen_BV: which tokens have occurred; needed with a repetition penalty.
        seeds_B: uint32.
        place: number of tokens that were drawn before, int32 scalar.
    """
    if sampling.temperature == 0:
        return _first_best(penalised(logits_BV, seen_BV, sampling))
    scores_BW, tokens_BW = candidates(logits_BV, seen_BV, sampling)
    keys_B = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), place))(seeds_B)
    choice_B = jax.vmap(jax.random.categorical)(keys_B, scores_BW)
    return jnp.take_along_axis(tokens_BW, choice_B[:, None], axis=1)[:, 0].astype(jnp.int32)


def _first_best(scores_BV: jax.Array) -> jax.Array:
    """jnp.argmax of each row, int32. In two passes that XLA's CPU backend vectorises, unlike its reduction of
    values with their places."""
    last = scores_BV.shape[1] - 1
    is_best_BV = scores_BV == scores_BV.max(axis=-1, keepdims=True)
    return jnp.where(is_best_BV, jnp.arange(last + 1, dtype=jnp.int32)[None], last).min(axis=-1)


def penalised(logits_BV: jax.Array, seen_BV: jax.Array | None, sampling: Sampling) -> jax.Array:
    """Scores after the repetition penalty."""
    if sampling.repetition_penalty == 1 or seen_BV is None:
        return logits_BV
    penalty = jnp.float32(sampling.repetition_penalty)
    return jnp.where(seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def candidates(logits_BV: jax.Array, seen_BV: jax.Array | None, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """The tokens that can be drawn: scores [B, W], whose softmax are the probabilities (-inf for none), and
    ids [B, W]."""
    B, V = logits_BV.shape
    scores_BV = penalised(logits_BV, seen_BV, sampling) / sampling.temperature
    if sampling.top_k in (0, V) and sampling.top_p == 1:
        return scores_BV, jnp.broadcast_to(jnp.arange(V), (B, V))
    scores_BW, tokens_BW = jax.lax.top_k(scores_BV, min(sampling.top_k or V, V))
    if sampling.top_p < 1:
        probabilities_BW = jax.nn.softmax(scores_BW, axis=-1)
        better_BW = jnp.cumsum(probabilities_BW, axis=-1) - probabilities_BW
        # The best token is always left, whatever rounding makes of the sum before it.
        scores_BW = jnp.where(
            (better_BW < sampling.top_p) | (jnp.arange(scores_BW.shape[1]) == 0)[None], scores_BW, -jnp.inf
        )
    return scores_BW, tokens_BW
