"""Model FLOPs: what `aurora plan`, the training loop and the benchmarks divide by the peak to get MFU."""

from aurora_jax.model.config import ModelConfig
from aurora_jax.model.sharding import parameter_count


def flops_per_token(model: ModelConfig, length: int) -> float:
    """Training FLOPs a token: 6 N + 6 layers H C L (Chowdhery et al. 2022, arXiv 2204.02311, with the causal
    half of attention).

    Args:
        model: N is its number of parameters (the tied head counted once), H C its query heads times their dimension.
        length: tokens of a sequence (L).
    """
    return 6.0 * parameter_count(model) + 6.0 * model.layers * model.heads * model.head_dim * length
